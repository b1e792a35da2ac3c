"""A linear map on base logits: the only value network without layers, the paper's linear probe.

    z_value = z_base · head              rank 0: one V × V matrix
    z_value = (z_base · down) · head     rank R: V × R and R × V

In: the base's logits. Out: the input of its head, so that the same loss and decoding work for every
network. It does not read text, so it has no layers, no positions and no cache.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from ivl_jax.model.parameter import (
    Declaration,
    ParamPath,
    abstract_tree,
    declarations,
    static_half,
)
from ivl_jax.model.projection import AS_TRAINED, Projection

MODEL_TYPE = "linear_map"


@dataclasses.dataclass(frozen=True)
class LinearMapConfig:
    """The shape of a linear map on logits, with the attributes that every architecture has.

    Raises:
        ValueError: Invalid sizes.
    """

    vocab_size: int
    """Real tokens, V; a base's padding columns are not used."""
    rank: int = 0
    """Width between the two matrices, R; 0: one V × V matrix."""

    model_type: ClassVar[str] = MODEL_TYPE
    num_hidden_layers: ClassVar[int] = 0
    num_attention_heads: ClassVar[int] = 0
    num_key_value_heads: ClassVar[int] = 0
    head_dim: ClassVar[int] = 0
    base_hidden_size: ClassVar[int] = 0
    head_depths: ClassVar[int] = 1
    max_position_embeddings: ClassVar[int] = sys.maxsize
    """It has no positions, so it does not limit the context."""
    tie_word_embeddings: ClassVar[bool] = False
    final_logit_softcapping: ClassVar[None] = None

    def __post_init__(self):
        if self.vocab_size < 1 or not 0 <= self.rank < self.vocab_size:
            raise ValueError(
                f"a linear map needs vocab_size ≥ 1 and 0 ≤ rank < vocab_size (0: a full matrix), "
                f"got vocab_size = {self.vocab_size}, rank = {self.rank}"
            )

    def to_json(self) -> dict[str, Any]:
        """The record that `from_json` reads."""
        return {"model_type": MODEL_TYPE, "vocab_size": self.vocab_size, "rank": self.rank}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "LinearMapConfig":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: Entries are unknown, missing, or not integers.
        """
        sizes = {name: value for name, value in record.items() if name != "model_type"}
        expected = {"vocab_size", "rank"}
        if sizes.keys() != expected or not all(type(size) is int for size in sizes.values()):
            raise ValueError(f"a {MODEL_TYPE} has the integers {sorted(expected)}, got {sizes}")
        return cls(**sizes)


class LinearMap(nnx.Module):
    """The matrices of a linear map on logits."""

    def __init__(self, arch: LinearMapConfig, *, compute_dtype: DTypeLike, vocab_rows: int):
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.form = AS_TRAINED
        if arch.rank:
            self.down_proj = Projection(
                ("vocabulary", vocab_rows), ("embed", arch.rank), use_bias=False
            )
        # Both dimensions of a full matrix are the vocabulary; only one can be split over its mesh
        # axis.
        self.lm_head = Projection(
            ("embed", arch.rank or vocab_rows),
            ("vocabulary", vocab_rows),
            use_bias=False,
            initial="zeros",
        )


@functools.cache
def build_linear_map(
    arch: LinearMapConfig, *, compute_dtype: DTypeLike = jnp.float32
) -> nnx.GraphDef:
    """The static half of a linear map; the counterpart of `build_decoder`."""
    return static_half(LinearMap(arch, compute_dtype=compute_dtype, vocab_rows=arch.vocab_size))


def abstract_linear_map(
    arch: LinearMapConfig,
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
) -> dict[str, Any]:
    """Shapes and dtypes of a linear map's parameters; allocates nothing.

    Args:
        arch: The map's shape.
        param_dtype: Dtype the parameters are stored in.
        vocab_rows: Rows and columns of the vocabulary, more than it has to pad for a mesh; None:
            `arch.vocab_size`.

    Returns:
        `lm_head.kernel`, and with a rank `down_proj.kernel`.
    """
    rows = arch.vocab_size if vocab_rows is None else vocab_rows
    module = LinearMap(arch, compute_dtype=jnp.float32, vocab_rows=rows)
    return abstract_tree(module, param_dtype)


def parameter_declarations(arch: LinearMapConfig) -> dict[ParamPath, Declaration]:
    """Path → declaration of every parameter."""
    return declarations(LinearMap(arch, compute_dtype=jnp.float32, vocab_rows=arch.vocab_size))


def init_linear_map(
    arch: LinearMapConfig,
    key: Key[Array, ""],
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
) -> dict[str, Any]:
    """Initial parameters: the head is zero, so that at first nothing is added to the base.

    Args:
        arch: The map's shape.
        key: A typed PRNG key.
        param_dtype: See `abstract_linear_map`, also for the rest.
        vocab_rows: Rows and columns of the vocabulary.

    Returns:
        Arrays in the shapes of `abstract_linear_map`; `down_proj` keeps the logits' magnitude.
    """
    shapes = abstract_linear_map(arch, param_dtype=param_dtype, vocab_rows=vocab_rows)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if arch.rank:
        kernel = shapes["down_proj"]["kernel"]
        # The random rows must not depend on the number of padding rows.
        real = jax.random.normal(key, (arch.vocab_size, arch.rank), kernel.dtype)
        padding = ((0, kernel.shape[0] - arch.vocab_size), (0, 0))
        params["down_proj"]["kernel"] = jnp.pad(real * arch.vocab_size**-0.5, padding)
    return params


def linear_map_hidden(
    graphdef: nnx.GraphDef, params: Mapping[str, Any], logits: Float[Array, "B T Vb"]
) -> Float[Array, "B T D"]:
    """The input of the map's head for a base's logits.

    Args:
        graphdef: From `build_linear_map`.
        params: Nested dict of arrays.
        logits: fp32, padding columns zero; if their width differs from the map's (a base with more
            or fewer padding rows), columns that only one of them has count as 0.

    Returns:
        [B T R], or with rank 0 the logits themselves in the map's width; in the compute dtype.
    """
    module = nnx.merge(graphdef, params)
    down = module.down_proj.kernel[...] if module.arch.rank else None
    rows = params["lm_head"]["kernel"].shape[0] if down is None else down.shape[0]
    width = min(rows, logits.shape[-1])
    known = logits[..., :width].astype(module.compute_dtype)
    if down is None:
        return jnp.pad(known, ((0, 0), (0, 0), (0, rows - width)))
    return jnp.einsum("btv,vd->btd", known, down[:width].astype(module.compute_dtype))
