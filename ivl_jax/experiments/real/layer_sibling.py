"""A smaller sibling of a pre-trained model: its first and last layers, everything else unchanged.

In: a Hugging Face folder. Out: another one, with the same tokenizer, embeddings and head. Without
its middle layers a model predicts badly; distillation on text of the whole model heals it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import DTypeLike

from ivl_jax.config import ConfigError
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params
from ivl_jax.weights.language_model import (
    find_model,
    load_language_model,
    read_arch,
    save_language_model,
)

_T = TypeVar("_T")


def make_sibling(
    model: str | Path, folder: Path, *, first: int, last: int, dtype: DTypeLike = jnp.float32
) -> None:
    """Write the model folder of a sibling.

    Args:
        model: Folder or hub id of the whole model.
        folder: The folder to create; it appears once it is complete.
        first: Layers kept from the beginning.
        last: Layers kept from the end.
        dtype: float32 or bfloat16, of every tensor written.

    Raises:
        ConfigError: The model does not have that many layers; raised before its weights are read.
        FileExistsError: The folder exists and has files.
    """
    arch = read_arch(find_model(model))
    problem = layers_problem(first, last, layers=arch.num_hidden_layers)
    if problem is not None:
        raise ConfigError(f"{model}: {problem}")
    whole = load_language_model(model, param_dtype=dtype)
    kept = kept_layers(first, last, layers=arch.num_hidden_layers)
    sibling = dataclasses.replace(
        whole,
        path=str(folder),
        arch=sibling_arch(whole.arch, kept),
        params=sibling_params(whole.params, kept),
    )
    save_language_model(folder, sibling, dtype=dtype)


def layers_problem(first: int, last: int, *, layers: int) -> str | None:
    """Say why a sibling cannot have these layers; None if it can.

    >>> layers_problem(6, 4, layers=10)
    'first = 6 and last = 4 layers: expected at least 1 each and fewer than 10 together, which are \
all it has'
    """
    if first >= 1 and last >= 1 and first + last < layers:
        return None
    return (
        f"first = {first} and last = {last} layers: expected at least 1 each and fewer than "
        f"{layers} together, which are all it has"
    )


def kept_layers(first: int, last: int, *, layers: int) -> tuple[int, ...]:
    """The whole model's indices of a sibling's layers, in order.

    >>> kept_layers(2, 1, layers=30)
    (0, 1, 29)
    """
    return (*range(first), *range(layers - last, layers))


def sibling_arch(arch: ArchConfig, kept: Sequence[int]) -> ArchConfig:
    """The architecture with some of its layers.

    Args:
        arch: Of the whole model.
        kept: Indices of the layers, in order.

    Returns:
        The sibling's.
    """
    kinds = _chosen(arch.layer_types, kept)
    slides = "sliding_attention" in kinds
    return dataclasses.replace(
        arch,
        num_hidden_layers=len(kept),
        layer_types=kinds,
        rotary_layers=_chosen(arch.rotary_layers, kept) if arch.rotary_layers else (),
        sliding_window=arch.sliding_window if slides else None,
        sliding_rope_parameters=arch.sliding_rope_parameters if slides else None,
    )


def sibling_params(params: Params, kept: Sequence[int]) -> Params:
    """The parameters with some of the layers.

    Args:
        params: Of the whole model, layers unstacked.
        kept: Indices of the layers, in order.

    Returns:
        The sibling's; arrays are shared, not copied.
    """
    layers = {at: params["layers"][index] for at, index in enumerate(kept)}
    return {**params, "layers": layers}


def _chosen(each: tuple[_T, ...], kept: Sequence[int]) -> tuple[_T, ...]:
    return tuple(each[index] for index in kept)
