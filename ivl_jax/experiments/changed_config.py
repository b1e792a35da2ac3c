"""A training config with a few options changed: how a study's trainings differ from the demo's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ivl_jax.config import TrainConfig


def with_options(config: TrainConfig, tables: Mapping[str, Mapping[str, Any]]) -> TrainConfig:
    """A config with some options of its tables changed.

    Args:
        config: Of a run.
        tables: Table → option → value.

    Returns:
        The changed config.
    """
    changed: dict[str, Any] = {
        table: dataclasses.replace(getattr(config, table), **options)
        for table, options in tables.items()
    }
    return dataclasses.replace(config, **changed)
