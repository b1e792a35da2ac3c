"""Makes a value folder from a run's checkpoint, so that every saved step can be used and shared.

In: a run directory with `value_description/` (written once, at the start) and `checkpoints/`. Out:
a value folder.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

from etils import epath

from ivl_jax.checkpoint.adapted_model import find_adapted_model
from ivl_jax.checkpoint.arrays import read_host_arrays
from ivl_jax.checkpoint.steps import (
    NoUsableCheckpointError,
    best_step,
    complete_steps,
    find_usable_step,
    recorded_metrics,
)
from ivl_jax.checkpoint.value_arrays import merge_into_model
from ivl_jax.checkpoint.value_card import read_training_facts, write_card
from ivl_jax.checkpoint.value_folder import (
    PreTrainedTokenizerBase,
    check_replaceable,
    load_value,
    read_description,
    save_value,
    write_value_folder,
)
from ivl_jax.checkpoint.value_metadata import (
    METADATA_NAME,
    ValueFolderError,
    ValueMetadata,
    read_value_metadata,
)
from ivl_jax.model.decoder import unstack_layers
from ivl_jax.paths import absolute_path

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
DESCRIPTION_FOLDER = "value_description"

Which = int | Literal["best", "latest"]


def write_value_description(
    run_dir: epath.PathLike, *, metadata: ValueMetadata, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write, at the start of a run, its value folder without the arrays.

    Args:
        run_dir: the run directory.
        metadata: content of the later `ivl.json`; `steps` is set at export.
        tokenizer: the value network's own.
    """
    folder = absolute_path(run_dir) / DESCRIPTION_FOLDER
    write_value_folder(folder, metadata=metadata, tokenizer=tokenizer, params=None)


def export_value(
    run_dir: epath.PathLike,
    which: Which,
    out: epath.PathLike,
    *,
    overwrite: bool = False,
    merge: bool = False,
    value_model: epath.PathLike | None = None,
) -> int:
    """Make a value folder from one of a run's checkpoints.

    Runs in one process; the arrays pass through host memory, not through a device.

    Args:
        run_dir: the run directory; not modified.
        which: a step, `best` (on held-out rows, among the kept steps) or `latest`.
        out: the value folder to write.
        overwrite: replace an existing value folder.
        merge: merge an adapter into its model, so that the folder holds the whole network;
            `run_dir` may then be a LoRA value folder, and `which` is not read.
        value_model: folder or hub id of that model; None: the one that the run has recorded.

    Returns:
        The step that was exported.

    Raises:
        FileNotFoundError: the run directory has no value description.
        FileExistsError: `out` exists, and `overwrite` was not said or it is no value folder.
        NoUsableCheckpointError: the checkpoint does not exist or was altered, with the reasons; or
            the best or latest one is the untrained step 0, which is exported by its number only.
        ValueFolderError: the run's value description was altered; or `merge` without an adapter, or
            with a model of other weights.
    """
    run_dir, out = absolute_path(run_dir), absolute_path(out)
    check_replaceable(out, overwrite=overwrite)
    if merge and (run_dir / METADATA_NAME).exists():
        return _merge_folder(run_dir, out, overwrite=overwrite, value_model=value_model)
    description = run_dir / DESCRIPTION_FOLDER
    if not (description / METADATA_NAME).exists():
        raise FileNotFoundError(
            f"{description}/{METADATA_NAME} does not exist: {run_dir} is not the directory of a "
            "run that trains a value network"
        )
    metadata, tokenizer, _ = read_description(description)
    model = _model_to_merge(metadata, run_dir, value_model) if merge else None
    checkpoints = run_dir / CHECKPOINTS_FOLDER
    step, rejected = find_usable_step(checkpoints, _wanted_step(checkpoints, which))
    if step == 0 and which != 0:
        unusable = {0, *(one.step for one in rejected)}
        newer = [other for other in complete_steps(checkpoints) if other not in unusable]
        remedy = f"step {max(newer)} with --step latest" if newer else "a step once the run has one"
        raise NoUsableCheckpointError(
            f"the {which} checkpoint in {checkpoints} is step 0, before any training: "
            + ("no later one did better on held-out rows" if newer else "there is no later one")
            + f"; export {remedy}, or say --step 0 if you want the untrained network"
        )
    for one in rejected:
        logger.warning("a checkpoint in %s cannot be used: %s", checkpoints, one)
    state = checkpoints / str(step) / "state"
    try:
        params = read_host_arrays(state, "params")
    except KeyError:
        raise ValueFolderError(f"{state} has no `params`: it is not a train state") from None
    params = _with_integer_layers(params)
    if model is not None:
        if not all(isinstance(index, int) for index in params["layers"]):
            params = unstack_layers(params)
        params = merge_into_model(params, metadata, model)
        metadata = dataclasses.replace(metadata, adapter=None)
    metadata = dataclasses.replace(metadata, steps=step)
    save_value(
        out,
        params=params,
        metadata=metadata,
        tokenizer=tokenizer,
        overwrite=overwrite,
    )
    write_card(out, metadata, read_training_facts(run_dir, step))
    return step


def _merge_folder(
    folder: epath.Path, out: epath.Path, *, overwrite: bool, value_model: epath.PathLike | None
) -> int:
    _model_to_merge(read_value_metadata(folder), folder, value_model)
    value = load_value(folder, value_model=value_model)
    save_value(
        out,
        params=value.params,
        metadata=value.metadata,
        tokenizer=value.tokenizer,
        overwrite=overwrite,
    )
    return value.metadata.steps


def _model_to_merge(
    metadata: ValueMetadata, folder: epath.Path, value_model: epath.PathLike | None
) -> Path:
    """The folder of an adapter's model, its weights checked."""
    model = find_adapted_model(metadata, folder, () if value_model is None else (value_model,))
    if model is None:
        raise ValueFolderError(f"{folder}: --merge, but there is no adapter to merge: leave it out")
    return model.folder


def _wanted_step(checkpoints: epath.Path, which: Which) -> int | None:
    if which == "latest":
        return None
    if which != "best":
        return which
    manifests = complete_steps(checkpoints)
    metrics = {step: recorded_metrics(manifest) for step, manifest in manifests.items()}
    # What the newest one goes by: an earlier version may have written the first ones.
    for manifest in reversed(manifests.values()):
        by = manifest.about["best_by"]
        best = best_step(metrics, by["metric"], lower_is_better=by["lower_is_better"])
        if best is not None:
            return best
    raise NoUsableCheckpointError(
        f"none of the checkpoints {list(manifests)} in {checkpoints} has a held-out figure, so "
        "the best is not known: give a step, or latest"
    )


def _with_integer_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Restore the integer keys of unstacked layers; stacked layers are unchanged."""
    layers = params.get("layers", {})  # a linear map has none
    if layers and all(name.isdecimal() for name in layers):
        return params | {"layers": {int(name): layer for name, layer in layers.items()}}
    return params
