"""Proposers, as the rounds of speculative decoding see them: the seam for new ones.

In: nothing; these are records. A `Proposer` is a record of pure functions over arrays: a small base
model (`draft_proposer`), or one of your own, passed to `build_programs`. What it proposes decides
the speed of decoding: greedy text stays the same, and samples keep their distribution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.network import ComposedParams, Composition, Network
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.model.decoder import Params

BLOCK_WIDTHS = (1, 2, 4, 8)
"""Tokens that the base may read at once, the one before the proposals included."""
LONGEST = BLOCK_WIDTHS[-1] - 1
"""Proposals in a round, at most."""

PassSeconds = Callable[[Network, Params, int], float]
"""(network, parameters, tokens) → estimated seconds of one pass over that many tokens."""


class Proposals(NamedTuple):
    """What a round proposes; the places from the round's length on are empty."""

    tokens: Int[Array, "B K"]
    """What may follow each row; K is that of `longest_round`."""
    counts: Int[Array, " B"]
    """How many of them are real proposals; the rest is padding."""
    failed: Bool[Array, " B"]
    """Rows in which the proposer's own logits were not finite; they end with an error."""
    q_logits: Float[Array, "B K V"] | None = None
    """Their softmax is the distribution that each token was drawn from, in the base's columns;
    None: proposed deterministically (the distribution is one-hot)."""
    value_logits: tuple[Float[Array, "B K Vv"], ...] | None = None
    """Of each value network, at the prediction that verifies each proposal, where the proposer has
    run them: they have then read all proposals but the last. None: they read the proposals to
    verify them."""


@dataclass(frozen=True)
class Proposer:
    """A way to guess the next tokens; every function is pure and is traced into the programs.

    Attributes:
        name: What messages call it.
        empty: (composition, rows, capacity) → the proposer's own arrays, zeros, rows first: [B],
            [B S], [B S …] or caches [B K S H]. Rows are moved between batches with them.
        read_prompts: (composition, params, own arrays, tokens [B T], their positions [B T], prompt
            lengths [B] or None) → own arrays after these tokens of the prompts. With lengths they
            are whole prompts, right-padded; without, a block that follows what has been read, where
            a row whose prompt has ended reads its last token again.
        available: (state) → [B] how many tokens it could propose for each row.
        propose: (composition, params, state, count) → (`Proposals` of `count` ≥ 1 tokens per row,
            the state with what proposer and value networks have read).
        settle: (state, count, gained [B]) → own arrays once rows have got `gained` of the `count`
            proposals and the token after them; the state is the one before they were appended.
        seconds: (composition, params, pass_seconds, rows) → estimated seconds of one proposal for
            all rows, value networks not included.
        runs_values: Whether `propose` runs the value networks, one token at a time. Those with
            their own vocabulary it cannot run; where there are any, it gives no `value_logits`, and
            all value networks read the proposals once these are known.
        shardings: (composition on a mesh) → shardings of the own arrays, or a prefix of them.
    """

    name: str
    empty: Callable[[Composition, int, int], Any]
    read_prompts: Callable[[Composition, ComposedParams, Any, Array, Array, Array | None], Any]
    available: Callable[[DecodeState], Int[Array, " B"]]
    propose: Callable[
        [Composition, ComposedParams, DecodeState, Array], tuple[Proposals, DecodeState]
    ]
    settle: Callable[[DecodeState, Array, Array], Any]
    seconds: Callable[[Composition, ComposedParams, PassSeconds, int], float]
    shardings: Callable[[Composition], Any]
    runs_values: bool = False


def longest_round(composition: Composition) -> int:
    """Proposals in a round, at most: the room that `Proposals` have."""
    return composition.draft_length or LONGEST
