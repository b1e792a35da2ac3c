"""The decoder's parts: norm, projections, rotary embedding, attention, gated MLP, one layer.

In: activations `[B T D]` in the compute dtype. Out: the same. Norms, rotary angles and softmax
run in fp32; parameters may be stored in any float dtype and are cast where they are used.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.model.architecture import ArchConfig, RopeParameters

Constrain = Callable[[Array, tuple[str, ...]], Array]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def rope_frequencies(rope: RopeParameters, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair, `[H / 2]` fp32.

    Source: transformers `modeling_rope_utils.py`; Llama 3.1 for the `llama3` type.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.rope_theta) ** exponent
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        wavelength = 2 * np.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        # 0 where a whole original context holds fewer than `low` turns, 1 where it holds `high`.
        smooth = np.clip(
            (rope.original_max_position_embeddings / wavelength - low) / (high - low), 0.0, 1.0
        )
        frequencies = frequencies * (smooth + (1.0 - smooth) / rope.factor)
    return frequencies.astype(np.float32)


def rope_angles(
    positions: Int[Array, "B T"], rope: RopeParameters, *, head_dim: int
) -> Float[Array, "B T H2"]:
    """Rotation of every pair at every position, radians, fp32."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    return positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T H2"]) -> Float[Array, "B T N H"]:
    """Rotates pair (i, i + H/2) of every head by its angle, in fp32."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """c·tanh(x / c), or x itself where there is no cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in fp32."""

    def __init__(self, size: int, *, eps: float, unit_offset: bool, param_dtype: DTypeLike):
        fill = jnp.zeros if unit_offset else jnp.ones
        self.scale = nnx.Param(fill((size,), param_dtype))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalised and scaled x, in x's dtype."""
        wide = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32)
        if self.unit_offset:
            scale = 1.0 + scale
        normal = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * normal * scale).astype(x.dtype)


class Projection(nnx.Module):
    """x @ kernel (+ bias), the kernel stored (in, out)."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        use_bias: bool,
        std: float,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (size_in, size_out)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((size_out,), param_dtype))
        self.use_bias = use_bias

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """The projection in x's dtype."""
        y = jnp.dot(x, self.kernel[...].astype(x.dtype))
        return y + self.bias[...].astype(x.dtype)[None, None, :] if self.use_bias else y


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B 1 T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention with grouped key-value heads; softmax in fp32."""
    if softcap is None:
        full_mask = jnp.broadcast_to(mask, (query.shape[0], *mask.shape[1:]))
        # Its own bf16 path promotes implicitly, which the tests' strict mode refuses.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(query, key, value, mask=full_mask, scale=scale)
    batch, length, heads, width = query.shape
    groups = (batch, length, key.shape[2], heads // key.shape[2], width)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", query.reshape(groups), key, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * scale, softcap)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, arch: ArchConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.arch = arch
        queries = arch.num_attention_heads * arch.head_dim
        keys = arch.num_key_value_heads * arch.head_dim

        def project(size_in: int, size_out: int, use_bias: bool) -> Projection:
            std = arch.initializer_range
            return Projection(
                size_in, size_out, use_bias=use_bias, std=std, param_dtype=param_dtype, rngs=rngs
            )

        self.q_proj = project(arch.hidden_size, queries, arch.attention_bias)
        self.k_proj = project(arch.hidden_size, keys, arch.attention_bias)
        self.v_proj = project(arch.hidden_size, keys, arch.attention_bias)
        self.o_proj = project(queries, arch.hidden_size, arch.attention_output_bias)
        if arch.qk_norm:
            self.q_norm = _norm(arch, arch.head_dim, param_dtype)
            self.k_norm = _norm(arch, arch.head_dim, param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        angles: Float[Array, "B T H2"],
        mask: Bool[Array, "#B 1 T S"],
        remember: Callable[[Array, Array], tuple[Array, Array]],
        constrain: Constrain,
    ) -> Float[Array, "B T D"]:
        """Attends over what `remember` makes of this call's keys and values (a cache, or they alone)."""
        arch = self.arch
        names = ("batch", "length", "heads", "head_dim")
        heads = (*x.shape[:2], -1, arch.head_dim)
        query = constrain(self.q_proj(x).reshape(heads), names)
        key = constrain(self.k_proj(x).reshape(heads), names)
        value = constrain(self.v_proj(x).reshape(heads), names)
        if arch.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, angles), rotate(key, angles)
        key, value = remember(key, value)
        mixed = attend(
            query,
            key.astype(x.dtype),
            value.astype(x.dtype),
            mask=mask,
            scale=arch.query_pre_attn_scalar**-0.5,
            softcap=arch.attn_logit_softcapping,
        )
        return self.o_proj(constrain(mixed, names).reshape((*x.shape[:2], -1)))


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, arch: ArchConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        def project(size_in: int, size_out: int) -> Projection:
            std = arch.initializer_range
            return Projection(
                size_in, size_out, use_bias=False, std=std, param_dtype=param_dtype, rngs=rngs
            )

        self.hidden_act = arch.hidden_act
        self.gate_proj = project(arch.hidden_size, arch.intermediate_size)
        self.up_proj = project(arch.hidden_size, arch.intermediate_size)
        self.down_proj = project(arch.intermediate_size, arch.hidden_size)

    def __call__(self, x: Float[Array, "B T D"], *, constrain: Constrain) -> Float[Array, "B T D"]:
        """The gated MLP of x."""
        gate = _ACTIVATIONS[self.hidden_act](self.gate_proj(x))
        return self.down_proj(constrain(gate * self.up_proj(x), ("batch", "length", "mlp")))


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual stream; one structure for every layer of a decoder."""

    def __init__(self, arch: ArchConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.sandwich_norms = arch.sandwich_norms
        self.self_attn = Attention(arch, param_dtype=param_dtype, rngs=rngs)
        self.mlp = MLP(arch, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = _norm(arch, arch.hidden_size, param_dtype)
        self.post_attention_layernorm = _norm(arch, arch.hidden_size, param_dtype)
        if arch.sandwich_norms:
            self.pre_feedforward_layernorm = _norm(arch, arch.hidden_size, param_dtype)
            self.post_feedforward_layernorm = _norm(arch, arch.hidden_size, param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        angles: Float[Array, "B T H2"],
        mask: Bool[Array, "#B 1 T S"],
        remember: Callable[[Array, Array], tuple[Array, Array]],
        constrain: Constrain,
    ) -> Float[Array, "B T D"]:
        """The residual stream after this layer."""
        attended = self.self_attn(
            self.input_layernorm(x),
            angles=angles,
            mask=mask,
            remember=remember,
            constrain=constrain,
        )
        if self.sandwich_norms:
            x = x + self.post_attention_layernorm(attended)
            fed = self.mlp(self.pre_feedforward_layernorm(x), constrain=constrain)
            x = x + self.post_feedforward_layernorm(fed)
        else:
            x = x + attended
            x = x + self.mlp(self.post_attention_layernorm(x), constrain=constrain)
        return constrain(x, ("batch", "length", "embed"))


def _norm(arch: ArchConfig, size: int, param_dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(
        size, eps=arch.rms_norm_eps, unit_offset=arch.unit_offset_norms, param_dtype=param_dtype
    )
