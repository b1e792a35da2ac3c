"""The frozen model that a LoRA value folder's adapter belongs to, found by its fingerprint.

In: the folder's metadata, and where the model may be. Out: the model's folder, whose weights are
those that the adapter was trained with; or an error that says what to give.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from etils import epath

from ivl_jax.checkpoint.value_metadata import ValueFolderError, ValueMetadata
from ivl_jax.weights.fingerprint import weights_fingerprint
from ivl_jax.weights.language_model import find_model

_REMEDY = (
    "name the folder of the adapter's model: --value-model FOLDER where values are flags, "
    "value_model=… in Python, value.lora.model or distil.value_models in a training config"
)


class AdaptedModel(NamedTuple):
    """The model that an adapter changes."""

    path: str  # folder or hub id
    revision: str | None  # of a hub id
    folder: Path


def find_adapted_model(
    metadata: ValueMetadata, folder: epath.PathLike, given: Sequence[str | os.PathLike[str]] = ()
) -> AdaptedModel | None:
    """Find the model of an adapter, and check that its weights are those it was trained with.

    Args:
        metadata: of the value folder.
        folder: the value folder, for errors.
        given: folders or hub ids, of which one is the model; empty: where the metadata says.

    Returns:
        The model; None if the folder holds a whole network.

    Raises:
        FileNotFoundError: there is no such model.
        ValueFolderError: the model has other weights; names both fingerprints.
    """
    if metadata.adapter is None:
        return None
    record = metadata.adapter["model"]
    places = [(os.fspath(path), None) for path in given] or [(record["name"], record["revision"])]
    problems = []
    for path, revision in places:
        try:
            found = find_model(path, revision=revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds only an adapter of {record['name']}, and its model cannot be "
                f"found: {error}; {_REMEDY}"
            ) from error
        fingerprint = weights_fingerprint(found)
        if fingerprint == record["fingerprint"]:
            return AdaptedModel(path, revision, found)
        problems.append(f"{path}: {fingerprint}")
    listed = "".join(f"\n  - {problem}" for problem in problems)
    raise ValueFolderError(
        f"{folder} holds only an adapter of {record['name']}, which is of no use with other "
        f"weights: expected the fingerprint {record['fingerprint']}, found{listed}\n{_REMEDY}, "
        "with the weights that it had in training"
    )
