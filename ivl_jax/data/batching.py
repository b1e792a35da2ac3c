"""Lays tokenised dialogues out in batches.

In: tokenised dialogues with loss masks. Out: `Batch`es for training (endless, shuffled, resumable)
and for evaluation (one pass).
"""

from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Bool, Int32


class Batch(NamedTuple):
    """Rows of tokens and what to predict at each; numpy on the host, JAX arrays in a step."""

    tokens: Int32[Array | np.ndarray, "*B T"]  # inputs; padding holds the padding id
    targets: Int32[Array | np.ndarray, "*B T"]  # the token that follows in the same segment
    loss_mask: Bool[Array | np.ndarray, "*B T"]  # targets that count: the assistant's
    positions: Int32[Array | np.ndarray, "*B T"]  # from 0 in every segment
    segment_ids: Int32[Array | np.ndarray, "*B T"]  # 1, 2, … along a row; 0 is padding

    @property
    def token_mask(self) -> Bool[Array | np.ndarray, "*B T"]:
        """Real tokens, as opposed to padding."""
        return self.segment_ids > 0
