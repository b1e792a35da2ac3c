"""The trained models of a study as files of at most 20 MB in all, and the models from them again.

In: a laboratory's finished stages. Out: one file per stage, what its training changed in the model
that it started from (`low_rank_difference`). Another machine has that model too: the target, the
sibling made from it, or the donor restored from its own file.
"""

import dataclasses
import logging
from pathlib import Path

import jax.numpy as jnp

from ivl_jax.checkpoint import load_value
from ivl_jax.experiments.real.low_rank_difference import (
    add_difference,
    difference,
    load_difference,
    rank_within,
    save_difference,
)
from ivl_jax.experiments.real.settings import Stage
from ivl_jax.model.decoder import Params
from ivl_jax.weights.language_model import load_language_model, save_language_model

logger = logging.getLogger(__name__)

MEGABYTES = 20.0
# Share of the size per stage. The donor's is the largest: everything else starts from it. A LoRA
# adapter of rank 8 fits exactly.
SHARES: dict[Stage, float] = {
    "healing": 0.4,
    "value": 0.2,
    "donor_tuned": 0.1,
    "target_lora": 0.3,
}
START: dict[Stage, Stage | None] = {
    "healing": "sibling",
    "value": "healing",
    "donor_tuned": "healing",
    "target_lora": None,
}
"""The stage that makes the model that a training starts from; None: the target."""


def export_file(folder: Path, stage: Stage, key: str) -> Path:
    """The file of a stage.

    Args:
        folder: Of all files.
        stage: One of `SHARES`.
        key: What the stage's result depends on.

    Returns:
        The file.
    """
    return folder / f"{stage}-{key[:10]}.safetensors"


def export_change(
    file: Path, stage: Stage, *, start: Path, tuned: Path, identity: str, megabytes: float
) -> None:
    """Write what a training changed, unless it is there already.

    Args:
        file: From `export_file`.
        stage: One of `SHARES`.
        start: Folder of the model that the training started from.
        tuned: Model folder or value folder that it left.
        identity: Of the model that it started from.
        megabytes: Of all files together.
    """
    if file.exists():
        return
    before = load_language_model(start)
    rank = rank_within(before.arch, int(SHARES[stage] * megabytes * 1e6))
    change = difference(before.params, trained_params(tuned), rank=rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_difference(file, change, start=identity, about={"stage": stage})
    logger.info("%s: rank %d, %.1f MB", file, rank, file.stat().st_size / 1e6)


def restore_change(file: Path, folder: Path, *, start: Path, identity: str) -> None:
    """Make the model folder of a training's result from its file.

    Args:
        file: From `export_change`.
        folder: The model folder to create; a value network's too is a plain model folder.
        start: Folder of the model that the training started from.
        identity: Of that model.

    Raises:
        ConfigError: The file is not of that model.
    """
    before = load_language_model(start)
    change = load_difference(file, start=identity, arch=before.arch)
    params = add_difference(before.params, change)
    folder.parent.mkdir(parents=True, exist_ok=True)
    after = dataclasses.replace(before, path=str(folder), params=params)
    save_language_model(folder, after, dtype=jnp.float32)
    logger.info("restored %s from %s", folder, file)


def trained_params(folder: Path) -> Params:
    """The parameters in a model folder or a value folder."""
    if (folder / "config.json").exists():
        return load_language_model(folder).params
    return load_value(folder).params
