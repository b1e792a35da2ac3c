"""The plain form: all scores [B N T S] at once, under a boolean mask; the only one over a cache.

In: queries, keys, values and a mask. Out: the attended values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ivl_jax.model.product import multiply


def soft_cap(x: Array, cap: float | None) -> Array:
    """c·tanh(x / c), or x itself where there is no cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def attend(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    *,
    mask: Bool[Array, "#B 1 T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of N query heads over K key-value heads, N / K queries to each.

    Written out because `jax.nn.dot_product_attention` takes keys as [B S K H], which costs a
    transposed copy of the cache in every decode step, and has no soft cap. It computes what that
    function's `xla` implementation does.

    Args:
        query: Rotated queries.
        keys: Rotated keys, heads first.
        values: Values, heads first.
        mask: True where a query sees a key.
        scale: Factor on the scores.
        softcap: Scores become c·tanh(score / c); None: no cap.

    Returns:
        The attended values in the query's dtype; scores and softmax are fp32.
    """
    batch, length, heads, width = query.shape
    kv_heads, slots = keys.shape[1:3]
    groups = heads // kv_heads
    grouped = query.reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, groups * length, width)
    scores = multiply("bkmh,bksh->bkms", grouped, keys, dtype=jnp.float32)
    scores = soft_cap(scores * scale, softcap).reshape(batch, kv_heads, groups, length, slots)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(batch, kv_heads, groups * length, slots)
    mixed = multiply("bkms,bksh->bkmh", weights, values, dtype=values.dtype)
    mixed = mixed.reshape(batch, kv_heads, groups, length, width).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(query.shape)
