"""The sum that every figure and loss of a batch is made of.

In: a mask and per-token numbers. Out: their sum where the mask is set.
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
