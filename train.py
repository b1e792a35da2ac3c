"""Train a value network: `python train.py --help`. Installed as `ivl-train`."""

import sys

from ivl_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
