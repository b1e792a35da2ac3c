"""Sums over the segments of a batch row, at every position of the segment.

In: per-token numbers [B T] and ids that stay equal within a segment. Out: totals [B T]. Segments
are contiguous, as `ivl_jax.data.batching.lay_out_rows` packs them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int


def segment_totals(
    values: Float32[Array, "*A T"], ids: Int[Array, "*A T"]
) -> Float32[Array, "*A T"]:
    """Sum each segment and give the sum to all its positions.

    Two scans that restart at every border: unlike a scatter, they add in the same order on every
    device, and unlike differences of a running sum, they lose no digits of long rows.

    Args:
        values: what is added.
        ids: equal within a segment; neighbours differ.

    Returns:
        Each position's segment total.

    Example:
        >>> totals = segment_totals(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1, 1, 2, 2]))
        >>> totals.tolist()
        [3.0, 3.0, 7.0, 7.0]
    """
    begins = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), _differ(ids)], axis=-1)
    until = _restarting_sum(values, begins)
    since = jnp.flip(_restarting_sum(jnp.flip(values, -1), jnp.flip(is_last(ids), -1)), -1)
    return until + since - values


def is_last(ids: Int[Array, "*A T"]) -> Bool[Array, "*A T"]:
    """Whether a position is the last of its segment."""
    return jnp.concatenate([_differ(ids), jnp.ones_like(ids[..., :1], bool)], axis=-1)


def _differ(ids: Array) -> Array:
    return ids[..., 1:] != ids[..., :-1]


def _restarting_sum(values: Array, begins: Array) -> Array:
    """Running sum along the last axis that starts afresh where `begins`."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        total = jnp.where(right[1], right[0], left[0] + right[0])
        return total, left[1] | right[1]

    return jax.lax.associative_scan(join, (values, begins), axis=values.ndim - 1)[0]
