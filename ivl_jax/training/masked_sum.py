"""The sums that every figure and loss of a batch are made of.

In: a mask or weights, and per-token numbers. Out: their sum where the mask or weight is set.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32


def masked_sum(mask: Any, values: Array) -> Float32[Array, ""]:
    """Add up numbers in float32 where a mask is set.

    Args:
        mask: bool [*A B T], an array of JAX or NumPy.
        values: [*A B T] float or bool; they may be NaN or inf where the mask is not set.

    Returns:
        The sum; 0 if the mask is set nowhere.

    Example:
        >>> float(masked_sum(jnp.array([True, False]), jnp.array([2.0, jnp.nan])))
        2.0
    """
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))


def weighted_sum(weights: Array, values: Array) -> Float32[Array, ""]:
    """Σ w · value in float32; where w is 0, values may be NaN or inf.

    Example:
        >>> float(weighted_sum(jnp.array([0.0, 3.0]), jnp.array([jnp.inf, 2.0])))
        6.0
    """
    return masked_sum(weights != 0, weights * values)
