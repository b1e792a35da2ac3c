"""Every kind of network by one name: decoders, and the linear map on base logits.

In: an architecture of either kind. Out: its static half, its parameters' shapes, fresh parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from ivl_jax.model import decoder, linear_map
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params
from ivl_jax.model.linear_map import MODEL_TYPE, LinearMapConfig
from ivl_jax.model.projection import AS_TRAINED, KernelForm

Architecture = ArchConfig | LinearMapConfig


def architecture_to_json(arch: Architecture) -> dict[str, Any]:
    """A JSON-able record; of a decoder, the `config.json` that transformers reads."""
    return arch.to_json() if isinstance(arch, LinearMapConfig) else arch.to_hf()


def architecture_from_json(record: Mapping[str, Any]) -> Architecture:
    """Reads what `architecture_to_json` wrote.

    Raises:
        ValueError: Entries that are unknown or contradict each other.
    """
    if record.get("model_type") == MODEL_TYPE:
        return LinearMapConfig.from_json(record)
    return ArchConfig.from_hf(record)


def build_network(
    arch: Architecture,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    scan_layers: bool = False,
    form: KernelForm = AS_TRAINED,
) -> nnx.GraphDef:
    """The static half of a network; see `decoder.build_decoder`. A linear map has one form only."""
    if isinstance(arch, LinearMapConfig):
        return linear_map.build_linear_map(arch, compute_dtype=compute_dtype)
    return decoder.build_decoder(
        arch, compute_dtype=compute_dtype, remat=remat, scan_layers=scan_layers, form=form
    )


def abstract_network(
    arch: Architecture,
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    scan_layers: bool = False,
    form: KernelForm = AS_TRAINED,
) -> Params:
    """Shapes and dtypes of a network's parameters; see `decoder.abstract_params`."""
    if isinstance(arch, LinearMapConfig):
        return linear_map.abstract_linear_map(arch, param_dtype=param_dtype, vocab_rows=vocab_rows)
    return decoder.abstract_params(
        arch,
        param_dtype=param_dtype,
        vocab_rows=vocab_rows,
        scan_layers=scan_layers,
        form=form,
    )


def init_network(
    arch: Architecture,
    key: Key[Array, ""],
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    scan_layers: bool = False,
) -> Params:
    """Fresh parameters; see `decoder.init_params` and `linear_map.init_linear_map`."""
    if isinstance(arch, LinearMapConfig):
        return linear_map.init_linear_map(arch, key, param_dtype=param_dtype, vocab_rows=vocab_rows)
    return decoder.init_params(
        arch, key, param_dtype=param_dtype, vocab_rows=vocab_rows, scan_layers=scan_layers
    )


def vocabulary_dimensions(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Dotted path of each parameter with vocabulary rows → the dimensions that have them."""
    if not isinstance(arch, LinearMapConfig):
        return {"embed_tokens.embedding": (0,), "lm_head.kernel": (1,)}
    if arch.rank:
        return {"down_proj.kernel": (0,), "lm_head.kernel": (1,)}
    return {"lm_head.kernel": (0, 1)}
