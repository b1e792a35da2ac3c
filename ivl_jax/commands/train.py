"""Train a value network with a frozen base model, or fine-tune a model alone.

{program} --config configs/debug.toml

{program} --config configs/debug.toml --optimizer.learning-rate 3e-4 --run-dir runs/mine

{program} --config runs/mine/config.toml --resume

`--config FILE.toml` gives the values shown as defaults below; every other flag changes one of them.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ivl_jax.command_line.console import silence_failed_saves
from ivl_jax.command_line.guard import FAILED, called_as, run_command

if TYPE_CHECKING:
    from ivl_jax.config import TrainConfig

STOPPED_AND_SAVED = 75


def main() -> int:
    """Run the command line.

    Returns:
        The exit status; 75 where a signal stopped the run and its state is saved.
    """
    return run_command(
        called_as(),
        _train,
        when_stopped=lambda: (
            "aborted; --resume continues from the last checkpoint, if there is one"
        ),
        failure_status=FAILED,
    )


def read_flags(
    arguments: Sequence[str], *, program: str = "", description: str = ""
) -> "TrainConfig":
    """Read `--config`, then let every other flag change one of its values.

    Args:
        arguments: without the program's name.
        program: what the user called; empty: this process's name.
        description: the first paragraphs of the help; empty: train.py's.

    Returns:
        The config.

    Raises:
        SystemExit: after `--help`, or flags that cannot be read.
        ConfigError: no config is named, or its values or those of the flags cannot be used.
    """
    from ivl_jax.command_line.flags import parse_flags
    from ivl_jax.config import ConfigError, TrainConfig, load_config

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    chosen, rest = parser.parse_known_args(list(arguments))
    program = program or called_as()
    if chosen.config is None and not {"-h", "--help"} & set(rest):
        raise ConfigError(f"name a config: {program} --config configs/debug.toml")
    default = TrainConfig() if chosen.config is None else load_config(chosen.config)
    description = (description or __doc__ or "").replace("{program}", program)
    return parse_flags(TrainConfig, rest, prog=program, description=description, default=default)


def _train(arguments: Sequence[str]) -> int:
    config = read_flags(arguments)
    _start_logging()
    # Imported after the flags are read: JAX takes seconds that --help need not wait for.
    from ivl_jax.post_training import run

    return STOPPED_AND_SAVED if run(config).interrupted else 0


def _start_logging() -> None:
    """Show records above the progress bar on a terminal, as plain lines elsewhere."""
    import rich
    from rich.logging import RichHandler

    if rich.get_console().is_terminal:
        handler: logging.Handler = RichHandler(show_path=False, show_level=False)
        form = "%(message)s"
    else:
        handler, form = logging.StreamHandler(sys.stdout), "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler], force=True)
    logging.getLogger("ivl_jax").setLevel(logging.INFO)
    silence_failed_saves()
