"""Projections: a kernel stored as trained, as it decodes fastest, in int8, or with an adapter.

In: activations `[B T I]`. Out: `[B T O]`. The form is static; `ivl_jax.model.decode_layout` and
`ivl_jax.model.int8` convert parameters between forms.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from ivl_jax.model.parameter import Axis, Fused, Initial, declare
from ivl_jax.model.product import multiply
from ivl_jax.model.remat import keep

# Rows of an int8 kernel converted to floats at a time: 3 MB in float32 at a width of 768, which
# stays in a core's cache until it is multiplied.
_INT8_ROWS = 1024


Part = Literal["attention", "mlp", "head"]
Targets = Literal["all-linear", "attention", "mlp"]


@dataclass(frozen=True)
class Lora:
    """Which kernels of a decoder have a low-rank adapter: x @ (W + alpha / rank · A @ B).

    Attributes:
        rank: Width between A (in, rank) and B (rank, out).
        alpha: Scale of the product, divided by the rank.
        targets: Projections of attention, of the MLP, or both (`all-linear`); never the head.
    """

    rank: int
    alpha: float
    targets: Targets

    @property
    def scale(self) -> float:
        """The factor of A @ B."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class KernelForm:
    """How a decoder's kernels are stored.

    Attributes:
        rows: (out, in), with projections of the same input fused, instead of (in, out).
        int8: In int8, with one float32 scale per output feature.
        lora: With adapters, for training; None: without. Not with `rows`.
    """

    rows: bool = False
    int8: bool = False
    lora: Lora | None = None

    def of(self, part: Part) -> "KernelForm":
        """The form of the kernels in one part of a decoder."""
        if self.lora is None or self.lora.targets == part:
            return self
        if self.lora.targets == "all-linear" and part != "head":
            return self
        return replace(self, lora=None)


AS_TRAINED = KernelForm()


class Projection(nnx.Module):
    """x @ kernel (+ bias), with the kernel stored in `form`."""

    def __init__(
        self,
        size_in: Axis,
        size_out: Axis,
        *,
        use_bias: bool,
        form: KernelForm = AS_TRAINED,
        initial: Initial = "normal",
        fused_in: Fused | None = None,
    ):
        self.kernel = declare(
            *((size_out, size_in) if form.rows else (size_in, size_out)),
            initial=initial,
            dtype=jnp.int8 if form.int8 else None,
            transposed=not form.rows,
            fused_in=fused_in,
        )
        if form.int8:
            self.scale = declare(size_out, initial="ones", dtype=jnp.float32, hf_suffix=None)
        if form.lora is not None:
            rank, wide = (None, form.lora.rank), jnp.float32
            self.lora_a = declare(size_in, rank, dtype=wide, hf_suffix=None)
            self.lora_b = declare(rank, size_out, initial="zeros", dtype=wide, hf_suffix=None)
        if use_bias:
            # A bias on the residual stream is small and not split, like the norms.
            axis = (None, size_out[1]) if size_out[0] == "embed" else size_out
            self.bias = declare(axis, initial="zeros", hf_suffix="bias", fused_in=fused_in)
        self.use_bias = use_bias
        self.kernel_form = form

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """The projection in x's dtype."""
        scale = self.scale[...] if self.kernel_form.int8 else None
        y = project(x, self.kernel[...], scale, rows=self.kernel_form.rows, dtype=x.dtype)
        if self.kernel_form.lora is not None:
            low = multiply("bti,ir->btr", x, self.lora_a[...], dtype=x.dtype)
            change = multiply("btr,ro->bto", low, self.lora_b[...], dtype=x.dtype)
            y = y + jnp.asarray(self.kernel_form.lora.scale, x.dtype) * change
        if self.use_bias:
            y = y + self.bias[...].astype(x.dtype)[None, None, :]
        return keep(y)


def project(
    x: Float[Array, "B T I"],
    kernel: Float[Array, "_ _"] | Int8[Array, "_ _"],
    scale: Float[Array, " O"] | None = None,
    *,
    rows: bool,
    dtype: DTypeLike,
) -> Float[Array, "B T O"]:
    """Multiply activations with a kernel of any form.

    Args:
        x: Activations.
        kernel: [I O], or [O I] with `rows`.
        scale: Of each output feature, for an int8 kernel.
        rows: The kernel has one row per output feature.
        dtype: Of the result.

    Returns:
        The product.
    """
    sums = dtype if scale is None else jnp.float32
    if not rows:
        # Convert to float first, so that the gradient's kernel is a float too.
        y = multiply(
            "bti,io->bto", x, kernel if scale is None else kernel.astype(x.dtype), dtype=sums
        )
    elif scale is None:
        y = _multiply_rows(x, kernel, dtype=sums)
    else:
        y = _multiply_int8_rows(x, kernel)
    return y if scale is None else (y * scale[None, None, :]).astype(dtype)


def _multiply_rows(
    x: Float[Array, "B T I"], kernel: Float[Array, "O I"], *, dtype: DTypeLike
) -> Float[Array, "B T O"]:
    """Multiply x @ kernelᵀ with the kernel as the left factor, so its rows are read in order.

    For few tokens on CPU this is the fastest form: with the kernels of twelve 768-wide layers, 1, 8
    and 32 tokens take 0.7 × the time of `x @ kernel`, 512 tokens the same time.
    """
    # Without the barriers XLA folds the transpositions into the product, and 8 tokens take five
    # times as long; the transpositions themselves cost nothing compared with the kernel.
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    y = jnp.dot(kernel.astype(x.dtype), columns, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y).T.reshape((*x.shape[:2], kernel.shape[0]))


def _multiply_int8_rows(
    x: Float[Array, "B T I"], kernel: Int8[Array, "O I"]
) -> Float[Array, "B T O"]:
    """Multiply x @ kernelᵀ in float32, converting the kernel to floats tile by tile.

    A tile is multiplied while it is still in the cache, so that only int8 numbers are read from
    memory: 1.7 × as fast as the float32 kernel for one token, 1.2 to 1.9 × for eight (2 CPU cores,
    `python -m benchmarks int8`). `lax.map` keeps XLA from turning it into a loop over scalars.
    """
    features, width = kernel.shape
    columns = jax.lax.optimization_barrier(x.reshape(-1, width).T)

    def one_tile(tile: Int8[Array, "R I"]) -> Float[Array, "R M"]:
        floats = jax.lax.optimization_barrier(tile.astype(x.dtype))
        return jnp.dot(floats, columns, preferred_element_type=jnp.float32)

    size = _tile_rows(features)
    y = jax.lax.map(one_tile, kernel.reshape(-1, size, width)).reshape(features, -1)
    return y.T.reshape((*x.shape[:2], features))


def _tile_rows(features: int) -> int:
    """The largest tile of up to `_INT8_ROWS` rows that divides them into at least two tiles."""
    most = min(_INT8_ROWS, max(features // 2, 1))
    return next(size for size in range(most, 0, -1) if features % size == 0)
