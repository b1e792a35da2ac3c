"""Which keys each query of a row without a cache sees, as a boolean mask.

In: a length, segment ids, a window. Out: True where a query sees a key.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def own_mask(
    length: int, segment_ids: Int[Array, "B T"] | None, window: int | None
) -> Bool[Array, "_ 1 T T"]:
    """The mask of a whole row: a query sees itself and earlier keys.

    Within a sequence the distance of two indices equals that of their positions.

    Args:
        length: Tokens in a row, T.
        segment_ids: Queries see keys of their own segment only; None: one sequence.
        window: The most keys that a query sees, its own included; None: no limit.

    Returns:
        One mask per row, or a single one where there are no segments.
    """
    seen = visible_keys(jnp.arange(length, dtype=jnp.int32), jnp.int32(0), length, window)
    if segment_ids is None:
        return seen
    return seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def visible_keys(
    positions: Int[Array, " Q"], first: Int[Array, ""], span: int, window: int | None
) -> Bool[Array, "1 1 Q S"]:
    """Which of `span` keys from `first` on a query at each of these positions sees."""
    distance = positions[:, None] - (first + jnp.arange(span, dtype=jnp.int32))[None, :]
    seen = distance >= 0
    return (seen if window is None else seen & (distance < window))[None, None]
