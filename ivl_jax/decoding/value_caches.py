"""Value networks join and leave a batch: the same rows, with caches of other networks.

In: a `DecodeState` of some value networks. Out: one of others. Nothing that stays is copied.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.programs import Programs


def with_values(
    programs: Programs,
    state: DecodeState,
    strengths: Float32[np.ndarray, "B M"],
    *,
    kept: Sequence[int | None],
    mapped_capacity: int,
) -> DecodeState:
    """Put other value networks into a state.

    Args:
        programs: of the composition with the new value networks.
        state: B rows; its arrays go over into the result.
        strengths: α of each new value network; 0 in the rows that do not use it.
        kept: for each new value network, which one of the state it is; None: it joins, and has
            read nothing in any row.
        mapped_capacity: slots per row of those that join and have their own vocabulary.

    Returns:
        The state of these value networks.
    """
    alphas, fresh = programs.value_caches(
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
