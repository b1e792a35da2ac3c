"""Identifies the pre-trained weights that a run reads, so that a resumed run reads the same.

In: the config and the models it names. Out: a fingerprint of each.
"""

import hashlib
import json
from typing import NamedTuple

from ivl_jax.composed.sources import ModelSource
from ivl_jax.config import TrainConfig
from ivl_jax.manifest import read_manifest
from ivl_jax.training.models import Models
from ivl_jax.weights.fingerprint import remembered_weights, weights_fingerprint


class UsedWeights(NamedTuple):
    """The weights that a run reads."""

    bases: tuple[str, ...]
    """Fingerprint of each frozen base."""
    records: dict[str, dict[str, str]]
    """Config key → `path` and `fingerprint`, for the bases, the trained model's initial weights
    and the teacher."""


def _recorded_value(value: ModelSource) -> dict[str, str]:
    """A value network's record: its folder's manifest has the hash of every file."""
    if value.metadata is None:
        return {"path": value.path, "fingerprint": weights_fingerprint(value.local_folder)}
    manifest = json.dumps(read_manifest(value.folder).files, sort_keys=True, default=str)
    return {"path": value.path, "fingerprint": hashlib.sha256(manifest.encode()).hexdigest()}


def fingerprint_weights(config: TrainConfig, models: Models) -> UsedWeights:
    """Hash the weights that a run reads; files that have not changed since are not read again.

    Args:
        config: of the run.
        models: from `choose_models`.

    Returns:
        The fingerprints.
    """

    def record(model: ModelSource) -> dict[str, str]:
        remembered = remembered_weights(config.data.data_dir, model.path)
        found = weights_fingerprint(model.local_folder, remembered=remembered)
        return {"path": model.path, "fingerprint": found}

    several = len(models.bases) > 1
    keys = [f"bases[{i}].path" if several else "base.path" for i in range(len(models.bases))]
    records = {key: record(base.model) for key, base in zip(keys, models.bases, strict=True)}
    bases = tuple(one["fingerprint"] for one in records.values())
    if config.method == "sft":
        records["base.path"] = record(models.trained)
    elif config.value.init == "pretrained":
        records["value.path"] = record(models.trained)
    if models.adapter is not None:
        records["value.lora.model"] = records["value.path"]
        records["value.path"] = _recorded_value(models.adapter)
    if models.teacher is not None:
        records["distil.teacher"] = record(models.teacher.base)
        records |= {
            f"distil.values[{index}]": _recorded_value(value)
            for index, value in enumerate(models.teacher.values)
        }
    return UsedWeights(bases, records)
