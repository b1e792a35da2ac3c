"""Train a value network beside a frozen base model, or fine-tune a model alone.

python train.py --config configs/debug.toml

python train.py --config configs/debug.toml --optimizer.learning-rate 3e-4 --run-dir runs/mine

python train.py --config runs/mine/config.toml --resume

`--config FILE.toml` gives the values shown as defaults below; every other flag changes one of them.
"""

import argparse
import logging
import signal
import sys

import rich
from rich.logging import RichHandler

from ivl_jax.command_line.flags import parse_flags
from ivl_jax.config import ConfigError, TrainConfig, load_config


def read_command_line(arguments: list[str]) -> TrainConfig:
    """Read `--config`, then let every other flag change one of its values."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.config is None and not {"-h", "--help"} & set(rest):
        raise ConfigError("name a config: python train.py --config configs/debug.toml")
    default = TrainConfig() if chosen.config is None else load_config(chosen.config)
    return parse_flags(TrainConfig, rest, prog="train.py", description=__doc__, default=default)


def start_logging() -> None:
    """Print records above the progress bar on a terminal, as plain lines elsewhere."""
    if rich.get_console().is_terminal:
        handler: logging.Handler = RichHandler(show_path=False, show_level=False)
        form = "%(message)s"
    else:
        handler, form = logging.StreamHandler(sys.stdout), "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler], force=True)
    logging.getLogger("ivl_jax").setLevel(logging.INFO)


def main() -> int:
    """Run the command line; return its exit status (75: stopped by a signal, and saved)."""
    try:
        config = read_command_line(sys.argv[1:])
        start_logging()
        # Imported after the flags are read: JAX takes seconds that --help need not wait for.
        from ivl_jax.training.loop import NonFiniteLossError, run
    except ConfigError as error:
        sys.stderr.write(f"train.py: {error}\n")
        return 2
    try:
        result = run(config)
    except (NonFiniteLossError, ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"train.py: {type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt as error:
        sys.stderr.write("train.py: aborted; --resume goes on from the last checkpoint\n")
        return 128 + getattr(error, "number", signal.SIGINT)
    return 75 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
