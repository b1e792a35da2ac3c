"""What `train.py` and `infer.py` do, installed as `ivl-train` and `ivl-infer`."""
