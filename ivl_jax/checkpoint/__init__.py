"""Checkpoints: the train state of a run, and the value folder that stands alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivl_jax.checkpoint.manager import RestoredRun, TrainCheckpointer
    from ivl_jax.checkpoint.steps import NoUsableCheckpointError, RejectedStep

# Loaded when first used: reading a value folder's metadata needs neither JAX nor Orbax (2 s).
_HOME = {
    "NoUsableCheckpointError": "steps",
    "RejectedStep": "steps",
    "RestoredRun": "manager",
    "TrainCheckpointer": "manager",
}
__all__ = ["NoUsableCheckpointError", "RejectedStep", "RestoredRun", "TrainCheckpointer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
