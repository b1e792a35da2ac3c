"""A common interface to both kinds of network: decoders, and the linear map on base logits.

In: an architecture of either kind. Out: its static half, its parameters' shapes, initial
parameters; and the logical axes of all parameters.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from ivl_jax.model import decoder, linear_map
from ivl_jax.model.architecture import ArchConfig, RopeParameters
from ivl_jax.model.attention.form import PLAIN, AttentionForm
from ivl_jax.model.decoder import Params
from ivl_jax.model.linear_map import MODEL_TYPE, LinearMapConfig
from ivl_jax.model.projection import AS_TRAINED, KernelForm, Lora
from ivl_jax.model.remat import Remat

Architecture = ArchConfig | LinearMapConfig


def architecture_to_json(arch: Architecture) -> dict[str, Any]:
    """A JSON-compatible record; for a decoder, the `config.json` that transformers reads."""
    return arch.to_json() if isinstance(arch, LinearMapConfig) else arch.to_hf()


def architecture_from_json(record: Mapping[str, Any]) -> Architecture:
    """Reads what `architecture_to_json` wrote.

    Raises:
        ValueError: Entries are unknown or contradict each other.
    """
    if record.get("model_type") == MODEL_TYPE:
        return LinearMapConfig.from_json(record)
    return ArchConfig.from_hf(record)


def build_network(
    arch: Architecture,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = False,
    form: KernelForm = AS_TRAINED,
    attention: AttentionForm = PLAIN,
    all_depths: bool = False,
) -> nnx.GraphDef:
    """The static half of a network; see `decoder.build_decoder`. A linear map has only one form."""
    if isinstance(arch, LinearMapConfig):
        return linear_map.build_linear_map(arch, compute_dtype=compute_dtype)
    return decoder.build_decoder(
        arch,
        compute_dtype=compute_dtype,
        remat=remat,
        scan_layers=scan_layers,
        form=form,
        attention=attention,
        all_depths=all_depths,
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
    """Initial parameters; see `decoder.init_params` and `linear_map.init_linear_map`."""
    if isinstance(arch, LinearMapConfig):
        return linear_map.init_linear_map(arch, key, param_dtype=param_dtype, vocab_rows=vocab_rows)
    return decoder.init_params(
        arch, key, param_dtype=param_dtype, vocab_rows=vocab_rows, scan_layers=scan_layers
    )


def vocabulary_dimensions(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Dotted path of each parameter with vocabulary rows → its vocabulary dimensions."""
    exact, longer = (
        jax.tree_util.tree_leaves_with_path(abstract_network(arch, vocab_rows=rows))
        for rows in (arch.vocab_size, arch.vocab_size + 1)
    )
    found = {}
    for (path, one), (_, other) in zip(exact, longer, strict=True):
        if one.shape != other.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            found[name] = tuple(
                index
                for index, sizes in enumerate(zip(one.shape, other.shape, strict=True))
                if sizes[0] != sizes[1]
            )
    return found


@functools.cache
def declared_axes() -> Mapping[str, tuple[str | None, ...]]:
    """Logical axes of every parameter of any network, by dotted path.

    Returns:
        Path without the layer number → logical name of each dimension, as declared by the
        parameter's module; including int8 kernels, their scales, and adapters.
    """
    decoders = (
        decoder.parameter_declarations(_with_every_parameter(), form=form)
        for form in (AS_TRAINED, KernelForm(int8=True), KernelForm(lora=Lora(1, 1.0, "all-linear")))
    )
    found: dict[str, tuple[str | None, ...]] = {}
    for declared in (linear_map.parameter_declarations(LinearMapConfig(2, rank=1)), *decoders):
        for path, declaration in declared.items():
            names = path[2:] if path[0] == "layers" else path
            found[".".join(map(str, names))] = declaration.axes
    return MappingProxyType(found)


def _with_every_parameter() -> ArchConfig:
    """An architecture with all switches on, so that it has every optional parameter."""
    smallest = ArchConfig(
        model_type="",
        vocab_size=1,
        hidden_size=1,
        intermediate_size=1,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=1,
        rms_norm_eps=1.0,
        rope_parameters=RopeParameters(1.0),
        query_pre_attn_scalar=1.0,
        layer_types=("full_attention",) * 2,
    )
    switches: dict[str, Any] = {
        field.name: True for field in dataclasses.fields(ArchConfig) if field.type is bool
    }
    switches |= {"tie_word_embeddings": False, "base_hidden_size": 1, "head_depths": 2}
    return dataclasses.replace(smallest, **switches)
