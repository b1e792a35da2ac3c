"""Checkpoints: the train state of a run, and the self-contained value folder."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivl_jax.checkpoint.export import export_value, write_value_description
    from ivl_jax.checkpoint.hub import push_to_hub
    from ivl_jax.checkpoint.manager import CheckpointSaveError, RestoredRun, TrainCheckpointer
    from ivl_jax.checkpoint.steps import NoUsableCheckpointError, RejectedStep
    from ivl_jax.checkpoint.value_folder import ValueNetwork, load_value, save_value
    from ivl_jax.checkpoint.value_metadata import (
        ValueFolderError,
        ValueMetadata,
        read_value_metadata,
    )

# Loaded on first use: reading a value folder's metadata needs neither JAX nor Orbax (2 s).
_HOME = {
    "CheckpointSaveError": "manager",
    "NoUsableCheckpointError": "steps",
    "RejectedStep": "steps",
    "RestoredRun": "manager",
    "TrainCheckpointer": "manager",
    "ValueFolderError": "value_metadata",
    "ValueMetadata": "value_metadata",
    "ValueNetwork": "value_folder",
    "export_value": "export",
    "load_value": "value_folder",
    "push_to_hub": "hub",
    "read_value_metadata": "value_metadata",
    "save_value": "value_folder",
    "write_value_description": "export",
}
__all__ = [
    "CheckpointSaveError",
    "NoUsableCheckpointError",
    "RejectedStep",
    "RestoredRun",
    "TrainCheckpointer",
    "ValueFolderError",
    "ValueMetadata",
    "ValueNetwork",
    "export_value",
    "load_value",
    "push_to_hub",
    "read_value_metadata",
    "save_value",
    "write_value_description",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
