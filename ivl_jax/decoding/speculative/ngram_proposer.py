"""N-grams of the text so far as a proposer: what followed the same tokens before may follow again.

In: a composition without a draft. Out: `NGRAM_PROPOSER`. It costs next to nothing, and pays where
texts repeat themselves or their prompt: edits of code, answers that quote. Where nothing in the row
ends as the row does, nothing is proposed for it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.proposals import Proposals, Proposer, longest_round
from ivl_jax.decoding.device.state import DecodeState

# Tokens that must agree, longer matches first: two alone agree by chance too often.
_LENGTHS = (4, 3, 2)


def find_repetition(tokens: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Find where the last tokens of each row occurred before.

    Args:
        tokens: [B S] tokens; nothing is meant beyond a row's length.
        lengths: [B] tokens of each row.

    Returns:
        [B] position that follows the latest earlier occurrence of the row's last four tokens, of
        its last three where those did not occur, or of its last two; 0 where none did.

    Example:
        >>> row = jnp.asarray([[5, 6, 7, 9, 5, 6, 0, 0]])
        >>> find_repetition(row, jnp.asarray([6])).tolist()
        [2]
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    last = lengths[:, None] - 1
    agree: Bool[Array, "B S"] = (places > 0) & (places <= last)
    found = jnp.zeros_like(lengths)
    for back in range(max(_LENGTHS)):
        # agree[b, p]: the tokens p − back … p − 1 are the row's last ones.
        token = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
        earlier = jnp.roll(tokens, back + 1, axis=1)
        agree &= (earlier == token) & (places > back) & (last >= back)
        if back + 1 in _LENGTHS:
            longer = jnp.max(jnp.where(agree, places, 0), axis=1).astype(jnp.int32)
            found = jnp.where(longer > 0, longer, found)
    return found


def _available(state: DecodeState) -> Int[Array, " B"]:
    found = find_repetition(state.tokens, state.lengths)
    # What follows the match up to the row's end is proposed again and again: a row may be periodic.
    return jnp.where(found > 0, jnp.int32(state.tokens.shape[1]), jnp.int32(0))


def _propose(
    composition: Composition, params: ComposedParams, state: DecodeState, count: Int[Array, ""]
) -> tuple[Proposals, DecodeState]:
    del params
    found = find_repetition(state.tokens, state.lengths)
    period = jnp.maximum(state.lengths - found, 1)[:, None]
    steps = jnp.arange(longest_round(composition), dtype=jnp.int32)[None, :]
    following = jnp.where(found > 0, found, 0)[:, None] + steps % period
    proposals = Proposals(
        tokens=jnp.take_along_axis(state.tokens, following, axis=1, mode="clip"),
        counts=jnp.where(found > 0, count, 0).astype(jnp.int32),
        failed=jnp.zeros_like(state.running),
    )
    return proposals, state


NGRAM_PROPOSER = Proposer(
    name="n-grams",
    empty=lambda composition, rows, capacity: (),
    read_prompts=lambda composition, params, own, tokens, positions, lengths: own,
    available=_available,
    propose=_propose,
    settle=lambda state, count, gained: (),
    seconds=lambda composition, params, pass_seconds, rows: 0.0,
    shardings=lambda composition: (),
)
