"""Where a run's figures can be watched: TensorBoard, Weights & Biases.

In: `logging.trackers` and figures of a step. Out: a tracker for each, all with the same methods.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from ivl_jax.config import ConfigError, TrackerName
from ivl_jax.training.event_files import EventFiles
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.wandb_run import WandbRun


@runtime_checkable
class Tracker(Protocol):
    """Shows scalars of a run."""

    def add(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Add scalars.

        Args:
            group: what precedes their names.
            figures: name → value.
            step: their step.
        """
        ...

    def copy(self) -> None:
        """Copy what has been added to where it is kept, if that is elsewhere."""
        ...

    def close(self) -> None:
        """Write what is left and close."""
        ...


_OPENERS: Mapping[TrackerName, Callable[[RunDirectory, int], Tracker]] = {
    "tensorboard": lambda run, first_step: EventFiles(run.tensorboard, first_step=first_step),
    "wandb": lambda run, first_step: WandbRun(run.path, first_step=first_step),
}


def open_trackers(
    names: Sequence[TrackerName], run: RunDirectory, *, first_step: int
) -> list[Tracker]:
    """Open the trackers of a run, on the process that writes.

    Args:
        names: `logging.trackers`.
        run: the run directory.
        first_step: steps taken before this start.

    Returns:
        One per name.
    """
    return [_OPENERS[name](run, first_step) for name in names]


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the trackers can be opened.

    Args:
        names: `logging.trackers`.

    Raises:
        ConfigError: a package or an API key is missing; says the remedy.
    """
    if "wandb" not in names:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            'logging.trackers has "wandb", which needs the extra `wandb`: pip install '
            "'ivl_jax[wandb]' (in a clone: pip install -e '.[wandb]')"
        )
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError(
            'logging.trackers has "wandb", but there is no API key: run `wandb login`, or set '
            "WANDB_MODE=offline and upload the run afterwards with `wandb sync`"
        )
