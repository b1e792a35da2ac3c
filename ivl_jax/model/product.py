"""Products of two arrays: factors in the compute dtype, sums in float32, forward and backward.

In: a contraction and two arrays. Out: their product in the requested dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ivl_jax.target_platform import target_platform


def multiply(
    contraction: str, x: Float[Array, "..."], y: Float[Array, "..."], *, dtype: DTypeLike
) -> Float[Array, "..."]:
    """Contract activations with activations or with a parameter, in the dtype of `x`.

    Differs from `jnp.einsum` only for dtypes other than float32. JAX multiplies the gradient of a
    float32 result (logits, scores) in float32 at half the speed or less; here it is first rounded
    to the dtype of `x`, like the result itself if requested in that dtype. The gradient of a
    float32 parameter is float32, unrounded.

    Args:
        contraction: two operands and a result of `jnp.einsum`, each index in at least two of
            the three.
        x: Activations; the product is computed in their dtype.
        y: Cast to that dtype.
        dtype: Of the result.

    Returns:
        The product.
    """
    return _multiply(contraction, jnp.dtype(dtype), x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multiply(contraction: str, dtype: jnp.dtype, x: Array, y: Array) -> Array:
    # On CPU, XLA multiplies bfloat16 into float32 at twice the speed of float32, but into bfloat16
    # only at the speed of float32 (Zen 4); accelerators always sum in float32.
    sums = jnp.float32 if target_platform() == "cpu" else dtype
    return jnp.einsum(contraction, x, y.astype(x.dtype), preferred_element_type=sums).astype(dtype)


def _forward(
    contraction: str, dtype: jnp.dtype, x: Array, y: Array
) -> tuple[Array, tuple[Array, Array]]:
    product: Array = _multiply(contraction, dtype, x, y)
    return product, (x, y)


def _backward(
    contraction: str, dtype: jnp.dtype, factors: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    del dtype
    operands, result = contraction.split("->")
    of_x, of_y = operands.split(",")
    x, y = factors
    gradient = gradient.astype(x.dtype)
    x_gradient: Array = _multiply(f"{result},{of_y}->{of_x}", x.dtype, gradient, y)
    y_gradient: Array = _multiply(f"{of_x},{result}->{of_y}", y.dtype, x, gradient)
    return x_gradient, y_gradient


_multiply.defvjp(_forward, _backward)
