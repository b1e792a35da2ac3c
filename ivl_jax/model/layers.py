"""The decoder's modules: norm, projection, attention, gated MLP, layer, and the tree of them.

Modules declare their parameters (`parameter.declare`); `decoder` fills them.

In: activations `[B T D]` in the compute dtype. Out: the same. Norms, scores and softmax run
in fp32; parameters may be stored in any float dtype and are cast where they are used.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.attention.form import AttentionForm
from ivl_jax.model.depths import Depths
from ivl_jax.model.parameter import Fused, declare
from ivl_jax.model.projection import KernelForm, Projection
from ivl_jax.model.remat import Remat
from ivl_jax.model.rope import Rotation, rotate

Constrain = Callable[[Array, tuple[str, ...]], Array]
"""(activations, logical name of each axis) → the same activations, their sharding constrained."""
Memory = Any
"""What a layer remembers between calls: None, or the arrays of a cache."""
Write = Callable[[Memory, Array, Array], tuple[Memory, Array, Array]]
"""(memory, new keys [B K T H], new values) → (memory, all keys [B K S H], all values)."""
Attend = Callable[[Array, Array, Array, float, float | None], Array]
"""(queries [B T N H], keys [B K S H], values, scale, soft cap) → attended values [B T N H]."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def split_features(y: Float[Array, "B T _"], sizes: Sequence[int]) -> tuple[Array, ...]:
    """Parts of the last axis, of these sizes."""
    return tuple(jnp.split(y, list(itertools.accumulate(sizes))[:-1], axis=-1))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in fp32."""

    def __init__(self, size: int, *, eps: float, unit_offset: bool):
        self.scale = declare((None, size), initial="zeros" if unit_offset else "ones")
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(
        self, x: Float[Array, "*B D"], offset: Float[Array, " D"] | None = None
    ) -> Float[Array, "*B D"]:
        """Normalised and scaled x, in x's dtype; an offset is added to the scale."""
        wide = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32)
        if offset is not None:
            scale = scale + offset.astype(jnp.float32)
        if self.unit_offset:
            scale = 1.0 + scale
        normal = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return (wide * normal * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, arch: ArchConfig, *, form: KernelForm):
        embed = ("embed", arch.hidden_size)
        queries = ("heads", arch.num_attention_heads * arch.head_dim)
        keys = ("kv_heads", arch.num_key_value_heads * arch.head_dim)
        self.head_dim = arch.head_dim
        self.qk_norm, self.joint_qk_norm = arch.qk_norm, arch.joint_qk_norm
        self.scale = arch.query_pre_attn_scalar**-0.5
        self.softcap = arch.attn_logit_softcapping

        form = form.of("attention")
        bias = arch.attention_bias
        self.projected_sizes = (queries[1], keys[1], keys[1])
        self.kernel_form = form
        if form.rows:
            fused = (None, sum(self.projected_sizes))
            self.qkv_proj = Projection(embed, fused, use_bias=bias, form=form)
        else:
            in_q, in_k, in_v = _fused_in(arch, "qkv_proj", self.projected_sizes)
            self.q_proj = Projection(embed, queries, use_bias=bias, form=form, fused_in=in_q)
            self.k_proj = Projection(embed, keys, use_bias=bias, form=form, fused_in=in_k)
            self.v_proj = Projection(embed, keys, use_bias=bias, form=form, fused_in=in_v)
        self.o_proj = Projection(queries, embed, use_bias=arch.attention_output_bias, form=form)
        if arch.qk_norm:
            joint = arch.joint_qk_norm
            self.q_norm = norm_of(arch, queries[1] if joint else arch.head_dim)
            self.k_norm = norm_of(arch, keys[1] if joint else arch.head_dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        rotation: Rotation,
        attend: Attend,
        memory: Memory,
        write: Write,
        constrain: Constrain,
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """Attends over what `write` makes of the memory and this call's keys and values."""
        names = ("batch", "length", "heads", "head_dim")
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = self._projected(x)
        if memory is not None and not self.kernel_form.rows:
            # Else the TPU's compiler splits the kernels, not their products, into heads, and keeps
            # a copy of them all in that form.
            query, key, value = jax.lax.optimization_barrier((query, key, value))
        if self.qk_norm and self.joint_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (constrain(y.reshape(heads), names) for y in (query, key, value))
        if self.qk_norm and not self.joint_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        memory, keys, values = write(memory, key.swapaxes(1, 2), value.swapaxes(1, 2))
        keys, values = keys.astype(x.dtype), values.astype(x.dtype)
        mixed = attend(query, keys, values, self.scale, self.softcap)
        return self.o_proj(constrain(mixed, names).reshape((*x.shape[:2], -1))), memory

    def _projected(self, x: Float[Array, "B T D"]) -> tuple[Array, ...]:
        """Queries, keys and values, heads side by side."""
        if not self.kernel_form.rows:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return split_features(self.qkv_proj(x), self.projected_sizes)


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, arch: ArchConfig, *, form: KernelForm):
        embed, inner = ("embed", arch.hidden_size), ("mlp", arch.intermediate_size)
        self.hidden_act = arch.hidden_act
        self.inner = arch.intermediate_size
        form = form.of("mlp")
        self.kernel_form = form
        if form.rows:
            fused = (None, 2 * self.inner)
            self.gate_up_proj = Projection(embed, fused, use_bias=False, form=form)
        else:
            in_gate, in_up = _fused_in(arch, "gate_up_proj", (self.inner, self.inner))
            self.gate_proj = Projection(embed, inner, use_bias=False, form=form, fused_in=in_gate)
            self.up_proj = Projection(embed, inner, use_bias=False, form=form, fused_in=in_up)
        self.down_proj = Projection(inner, embed, use_bias=False, form=form)

    def __call__(self, x: Float[Array, "B T D"], *, constrain: Constrain) -> Float[Array, "B T D"]:
        """The gated MLP of x."""
        if self.kernel_form.rows:
            gate, up = split_features(self.gate_up_proj(x), (self.inner, self.inner))
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        inner = _ACTIVATIONS[self.hidden_act](gate) * up
        return self.down_proj(constrain(inner, ("batch", "length", "mlp")))


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual stream; one structure for every layer of a decoder."""

    def __init__(self, arch: ArchConfig, *, form: KernelForm):
        self.pre_norms, self.post_norms = arch.pre_norms, arch.post_norms
        self.self_attn = Attention(arch, form=form)
        self.mlp = MLP(arch, form=form)
        width = arch.hidden_size
        if arch.pre_norms:
            self.input_layernorm = norm_of(arch, width)
        # After attention; with norms before only, Hugging Face calls the one before the MLP so.
        self.post_attention_layernorm = norm_of(arch, width)
        if arch.pre_norms and arch.post_norms:
            self.pre_feedforward_layernorm = norm_of(arch, width)
        if arch.post_norms:
            self.post_feedforward_layernorm = norm_of(arch, width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        rotation: Rotation,
        attend: Attend,
        memory: Memory,
        write: Write,
        constrain: Constrain,
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """The residual stream and the memory after this layer."""
        attended, memory = self.self_attn(
            self.input_layernorm(x) if self.pre_norms else x,
            rotation=rotation,
            attend=attend,
            memory=memory,
            write=write,
            constrain=constrain,
        )
        x = x + (self.post_attention_layernorm(attended) if self.post_norms else attended)
        fed = self.mlp(self._before_mlp(x), constrain=constrain)
        x = x + (self.post_feedforward_layernorm(fed) if self.post_norms else fed)
        return constrain(x, ("batch", "length", "embed")), memory

    def _before_mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if not self.pre_norms:
            return x
        norm = self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm
        return norm(x)


class Table(nnx.Module):
    """Token embeddings, one row a vocabulary entry."""

    def __init__(self, rows: int, size: int):
        self.embedding = declare(("vocabulary", rows), ("embed", size))


class Decoder(nnx.Module):
    """A decoder's parameters, and the static choices of how it runs."""

    def __init__(
        self,
        arch: ArchConfig,
        *,
        compute_dtype: DTypeLike,
        remat: Remat,
        scan_layers: bool,
        form: KernelForm,
        attention: AttentionForm,
        all_depths: bool,
        vocab_rows: int,
    ):
        self.arch = arch
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat: Remat = remat
        self.scan_layers = scan_layers
        self.form = form
        self.attention = attention
        self.all_depths = all_depths
        width = arch.hidden_size
        self.embed_tokens = Table(vocab_rows, width)
        if arch.base_hidden_size:
            # As trained in every form: it is small, and starts as nothing read of the base.
            self.base_projection = Projection(
                (None, arch.base_hidden_size), ("embed", width), use_bias=False, initial="zeros"
            )
        # Every layer has one structure, so the stacked form is a single layer of longer arrays.
        layers = [
            DecoderLayer(arch, form=form)
            for _ in range(1 if scan_layers else arch.num_hidden_layers)
        ]
        self.layers: Any = layers[0] if scan_layers else nnx.List(layers)
        self.norm = norm_of(arch, width)
        if arch.head_depths > 1:
            self.depths = Depths(arch.head_depths, width)
        if not arch.tie_word_embeddings:
            self.lm_head = Projection(
                ("embed", width), ("vocabulary", vocab_rows), use_bias=False, form=form.of("head")
            )


def _fused_in(arch: ArchConfig, module: str, sizes: Sequence[int]) -> list[Fused | None]:
    """Where files have projections of these sizes: one on top of the other, or each alone."""
    if not arch.fused_projections:
        return [None] * len(sizes)
    return [
        Fused(module, end - size)
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]


def norm_of(arch: ArchConfig, size: int) -> RMSNorm:
    """A norm over `size` numbers in the architecture's convention."""
    return RMSNorm(size, eps=arch.rms_norm_eps, unit_offset=arch.unit_offset_norms)
