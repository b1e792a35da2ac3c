"""Value networks join and leave a batch: the same rows, with caches of other networks.

In: a `DecodeState` of some value networks. Out: one of others. Nothing that stays is copied.
"""

from collections.abc import Sequence

import numpy as np

from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.engine_model import ModelParts, Places
from ivl_jax.decoding.entries import Entry


def with_values(
    parts: ModelParts,
    state: DecodeState,
    entries: Sequence[Entry | None],
    *,
    before: Places,
    after: Places,
    mapped_capacity: int,
) -> DecodeState:
    """Put other value networks into a state.

    Args:
        parts: the model.
        state: B rows; its arrays go over into the result.
        entries: the request of each row; None: none.
        before: the value networks of the state.
        after: those of the result; one that joins has read nothing in any row.
        mapped_capacity: slots per row of those that join and have their own vocabulary.

    Returns:
        The state of these value networks; a row has strength 0 for those that it does not use.
    """
    strengths = np.zeros((len(entries), len(after)), np.float32)
    for row, entry in enumerate(entries):
        if entry is not None:
            strengths[row] = entry.used.of(after)
    kept = [before.index(place) if place in before else None for place in after]
    alphas, fresh = parts.part(after).programs.value_caches(
        strengths,
        capacity=state.tokens.shape[1],
        mapped_capacity=mapped_capacity,
        which=tuple(index for index, old in enumerate(kept) if old is None),
    )
    old = state.caches.values
    caches = tuple(new if i is None else old[i] for i, new in zip(kept, fresh, strict=True))
    return state._replace(
        caches=state.caches._replace(values=caches),
        requests=state.requests._replace(strengths=alphas),
    )
