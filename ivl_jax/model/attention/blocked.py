"""The blocked form: a few queries at a time, so that memory grows with T and not with T².

In: queries, keys and values of one call. Out: the attended values; the backward pass recomputes
each block's scores. Plain XLA operations, for every device and mesh.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ivl_jax.model.attention.plain import attend
from ivl_jax.model.attention.visibility import visible_keys
from ivl_jax.model.remat import keep


def attend_in_blocks(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    block: int,
) -> Float[Array, "B T N H"]:
    """Causal attention over this call's own keys.

    Args:
        query: Rotated queries.
        keys: Rotated keys, heads first.
        values: Values, heads first.
        segment_ids: Queries see keys of their own segment only; None: one sequence.
        window: The most keys that a query sees, its own included; None: no limit. Keys
            before the window of a whole block are not read.
        scale: Factor on the scores.
        softcap: Scores become c·tanh(score / c); None: no cap.
        block: The most queries per block.

    Returns:
        What `plain.attend` returns under the mask of `own_mask`.
    """
    length = query.shape[1]
    count = -(-length // block)
    size = -(-length // count)
    span = length if window is None else min(length, window - 1 + size)
    # Padding queries see the last keys; their results are cut off.
    blocks = _split(query, count, size)
    segments = None if segment_ids is None else _split(segment_ids, count, size)
    starts = size * jnp.arange(count, dtype=jnp.int32)

    def one_block(
        carry: None, part: tuple[Array, Array, Array | None]
    ) -> tuple[None, Float[Array, "B Q N H"]]:
        queries, start, own = part
        first = jnp.clip(start + size - span, 0, length - span)
        read = [_cut(array, first, span, axis=2) for array in (keys, values)]
        seen = visible_keys(start + jnp.arange(size, dtype=jnp.int32), first, span, window)
        if segment_ids is not None and own is not None:
            others = _cut(segment_ids, first, span, axis=1)
            seen = seen & (own[:, None, :, None] == others[:, None, None, :])
        return carry, attend(queries, *read, mask=seen, scale=scale, softcap=softcap)

    if count == 1:
        return one_block(None, (query, jnp.int32(0), segment_ids))[1]
    # XLA does not merge a scan's body with its recomputation, so `prevent_cse` is not needed.
    step = jax.checkpoint(one_block, prevent_cse=False)
    _, mixed = jax.lax.scan(step, None, (blocks, starts, segments))
    mixed = mixed.swapaxes(0, 1).reshape(query.shape[0], -1, *query.shape[2:])
    return keep(mixed[:, :length])


def _split(array: Array, count: int, size: int) -> Array:
    """[B T …] as [count B size …], padded with zeros at the end."""
    missing = count * size - array.shape[1]
    padded = jnp.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
    return padded.reshape(array.shape[0], count, size, *array.shape[2:]).swapaxes(0, 1)


def _cut(array: Array, first: Array, span: int, *, axis: int) -> Array:
    """`span` entries from `first` on; all of them without a slice."""
    if span == array.shape[axis]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, first, span, axis=axis)
