"""Decode with a base model and a value network: flags in, text out.

python infer.py --base BASE --value VALUE --prompt "Once upon a time"

python infer.py --base BASE --value VALUE --input prompts.jsonl --output out.jsonl

python infer.py --base BASE --value VALUE --chat

python infer.py --base BASE --value A --value B --strength 1 --strength -0.5 --prompt "Once"
"""

import logging
import sys

from ivl_jax.command_line.flags import parse_flags
from ivl_jax.config import ConfigError, InferConfig


def main() -> int:
    """Run the command line; return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("ivl_jax").setLevel(logging.INFO)
    try:
        config = parse_flags(InferConfig, sys.argv[1:], prog="infer.py", description=__doc__)
        # Imported after the flags are read: JAX takes a second that --help need not wait for.
        from ivl_jax.decoding import command
        from ivl_jax.decoding.generation import GenerationError

        work = command.prepare(config)
        if work is None:
            return 0
    except (ConfigError, OSError, ValueError) as error:
        sys.stderr.write(f"infer.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("infer.py: stopped before anything was decoded\n")
        return 130
    try:
        command.decode(work)
    except KeyboardInterrupt:
        resumable = "" if config.output is None else "; the same command goes on where it stopped"
        sys.stderr.write(f"infer.py: stopped{resumable}\n")
        return 130
    except GenerationError as error:
        sys.stderr.write(f"infer.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
