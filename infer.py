"""Decode with a base and value networks: `python infer.py --help`. Installed as `ivl-infer`."""

import sys

from ivl_jax.commands.infer import main

if __name__ == "__main__":
    sys.exit(main())
