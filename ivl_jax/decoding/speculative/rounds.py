"""Lossless speculative decoding: a small draft proposes tokens, base and values judge them at once.

In: a composition with a draft, and a `DecodeState` that has a draft's part. Out: the state with
more tokens: those of plain decoding, or samples from the same distribution.

The draft is a small base under the same value networks. They read only text (the residual scheme),
so what they say while tokens are proposed also counts when these are judged: a round costs a pass
of the base over the block, a pass of draft and values a proposal, and a last one of the values
where all proposals were kept.

    proposing   token t, then for each proposal: z_draft + Σ α z_value → the next one; z_value kept
    judging     z_base over (t, proposals) + Σ α z_value → how many are kept, and what follows them

Greedy tokens can differ from plain decoding's only at a near-tie: a block of tokens is summed in
another order than one token, which moves float32 logits by about 1e-5. The block's arg-max is then
what counts, the lowest id among equals.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import NetworkLogits, compose, head_logits
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.generate import decode_step, halt, run_cached
from ivl_jax.decoding.device.sampling import sample_tokens
from ivl_jax.decoding.device.state import DecodeState, DraftState
from ivl_jax.decoding.speculative.acceptance import judge
from ivl_jax.decoding.speculative.draft_length import (
    BLOCK_WIDTHS,
    LONGEST,
    block_width,
    choose_length,
    remember,
    round_costs,
)
from ivl_jax.decoding.speculative.proposals import (
    Block,
    catch_up,
    draft_of,
    propose_block,
    run_values_ahead,
)
from ivl_jax.model.kv_cache import KVCache

# The width of the block for each number of proposals.
_WIDTHS = tuple(block_width(count) for count in range(LONGEST + 1))

_Carry = TypeVar("_Carry")


class _Verdict(NamedTuple):
    """What becomes of the proposals."""

    accepted: Int[Array, " B"]
    """How many are kept, from the first on."""
    following: Int[Array, " B"]
    """The composition's own token after them."""


def speculate_chunk(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    max_tokens: Int[Array, ""],
    stopped: Bool[Array, " B"],
    enough_done: Int[Array, ""],
) -> DecodeState:
    """Generate as `generate.decode_chunk` does; a row may get a few tokens more than it asks.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        state: where the rows are.
        max_tokens: tokens a row, before the last round.
        stopped: [B], rows that the host has ended since the last chunk (a stop string).
        enough_done: rows that are done when it ends, those that were done before included.

    Returns:
        The state afterwards.
    """
    before = state.lengths

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        behind = state.running & (state.lengths - before < max_tokens)
        return jnp.any(behind) & (jnp.sum(~state.running) < enough_done)

    def one_round(state: DecodeState) -> DecodeState:
        return speculate(composition, params, state)

    return jax.lax.while_loop(unfinished, one_round, halt(state, stopped))


def speculate(composition: Composition, params: ComposedParams, state: DecodeState) -> DecodeState:
    """One round: propose some tokens, judge them, append those kept and the one that follows.

    Where proposing does not pay, or a row has room for one token only, it is a plain step.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        state: where the rows are.

    Returns:
        The state with one token more a running row, or up to as many as were proposed and one.
    """
    count = _count(composition, params, state)
    state = _when(count == 0, functools.partial(_step, composition, params), state)
    return _when(count > 0, functools.partial(_round, composition, params, count), state)


def _step(composition: Composition, params: ComposedParams, state: DecodeState) -> DecodeState:
    """One plain step, where proposing does not pay; what was learned of the draft fades."""
    state = decode_step(composition, params, state)
    draft = draft_of(state)
    nothing = jnp.zeros_like(draft.judged)
    return state._replace(
        draft=draft._replace(
            recent_judged=remember(draft.recent_judged, nothing),
            recent_accepted=remember(draft.recent_accepted, nothing),
        )
    )


def _round(
    composition: Composition, params: ComposedParams, count: Int[Array, ""], state: DecodeState
) -> DecodeState:
    """Propose `count` tokens, at least one, and judge them."""
    state = catch_up(composition, params, state)
    block, state = propose_block(composition, params, state, count)
    base_logits, state = _read_block(composition, params, state, block, count)
    verdict, state = _judge_block(composition, params, state, block, base_logits, count)
    return _append(state, block.tokens, verdict, count)


def _count(composition: Composition, params: ComposedParams, state: DecodeState) -> Int[Array, ""]:
    """How many tokens are proposed, the same for all rows."""
    count, draft = jnp.int32(composition.draft_length), draft_of(state)
    if not composition.draft_length:
        count = choose_length(
            round_costs(composition, params, batch=state.lengths.shape[0]),
            judged=draft.recent_judged,
            accepted=draft.recent_accepted,
            running=state.running,
        )
    # The last token of a row needs no proposal before it.
    room = jnp.where(state.running, state.requests.limits - state.lengths - 1, 0)
    return jnp.minimum(count, jnp.max(room))


def _read_block(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    block: Block,
    count: Int[Array, ""],
) -> tuple[Float[Array, "B L V"], DecodeState]:
    """Let the base read the last token and the proposals at once; L = K + 1."""
    base = composition.base
    tokens = jnp.concatenate([state.last_tokens[:, None], block.tokens], axis=1)

    def of_width(
        width: int, carry: tuple[Float[Array, "B L V"], KVCache]
    ) -> tuple[Float[Array, "B L V"], KVCache]:
        positions = state.last_positions[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
        hidden, cache = run_cached(
            base, params.base, carry[1], tokens[:, :width], positions=positions
        )
        logits = head_logits(base, params.base, hidden)
        return jax.lax.dynamic_update_slice(carry[0], logits, (0, 0, 0)), cache

    widths, chosen = BLOCK_WIDTHS[1:], jnp.asarray(_WIDTHS, jnp.int32)[count]
    if composition.draft_length:
        widths = (composition.draft_length + 1,)
        chosen = jnp.int32(widths[0])
    batch, _, columns = block.q_logits.shape
    carry = (jnp.zeros((batch, widths[-1], columns), jnp.float32), state.caches.base)
    for width in widths:
        carry = _when(chosen == width, functools.partial(of_width, width), carry)
    return carry[0], state._replace(caches=state.caches._replace(base=carry[1]))


def _judge_block(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    block: Block,
    base_logits: Float[Array, "B L V"],
    count: Int[Array, ""],
) -> tuple[_Verdict, DecodeState]:
    """Judge the proposals from the first on, and choose the token that follows those kept.

    Only where a row's proposals were all kept do the values read the last one, as they would in
    plain decoding.
    """
    requests = state.requests
    indices = state.lengths - requests.prompt_lengths

    def composed(place: Int[Array, ""], values: tuple[Array, ...]) -> Float[Array, "B V"]:
        at = jax.lax.dynamic_slice_in_dim(base_logits, place, 1, axis=1)
        logits = NetworkLogits(at, values)
        strengths = requests.strengths
        return compose(composition, params.values, logits, strengths=strengths)[:, 0]

    def some_left(carry: tuple[Int[Array, ""], Bool[Array, " B"], _Verdict]) -> Bool[Array, ""]:
        return (carry[0] < count) & jnp.any(carry[1])

    def judge_one(
        carry: tuple[Int[Array, ""], Bool[Array, " B"], _Verdict],
    ) -> tuple[Int[Array, ""], Bool[Array, " B"], _Verdict]:
        place, left, verdict = carry
        at = jax.tree.map(
            lambda all_: jax.lax.dynamic_index_in_dim(all_, place, axis=1, keepdims=False), block
        )
        kept, replacement = judge(
            at.tokens,
            at.q_logits,
            composed(place, tuple(logits[:, None] for logits in at.value_logits)),
            requests.sampling,
            requests.keys,
            indices + place,
        )
        accepted = verdict.accepted + (left & kept).astype(jnp.int32)
        following = jnp.where(left & ~kept, replacement, verdict.following)
        return place + 1, left & kept, _Verdict(accepted, following)

    def go_on(
        carry: tuple[Int[Array, " B"], tuple[KVCache, ...]],
    ) -> tuple[Int[Array, " B"], tuple[KVCache, ...]]:
        following, caches = carry
        values, caches = run_values_ahead(composition, params, state, caches, last_proposals, count)
        chosen = sample_tokens(
            composed(count, values), requests.sampling, requests.keys, indices + count
        )
        return jnp.where(left, chosen, following), caches

    nothing = jnp.zeros_like(state.lengths)
    begin = (jnp.int32(0), state.running, _Verdict(nothing, nothing))
    _, left, verdict = jax.lax.while_loop(some_left, judge_one, begin)
    last_proposals = jax.lax.dynamic_index_in_dim(block.tokens, count - 1, axis=1, keepdims=False)
    following, caches = _when(jnp.any(left), go_on, (verdict.following, state.caches.values))
    verdict = verdict._replace(following=following)
    return verdict, state._replace(caches=state.caches._replace(values=caches))


def _when(condition: Bool[Array, ""], change: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """`change(carry)` under a condition, else `carry`; caches in it are changed in place.

    A loop of one turn: through `lax.cond` and `lax.switch` XLA copies a cache twice on CPU.
    """

    def once(loop: tuple[Array, _Carry]) -> tuple[Array, _Carry]:
        return jnp.asarray(False), change(loop[1])

    return jax.lax.while_loop(lambda loop: loop[0], once, (condition, carry))[1]


def _append(
    state: DecodeState,
    proposals: Int[Array, "B K"],
    verdict: _Verdict,
    count: Int[Array, ""],
) -> DecodeState:
    """Append to each running row what was kept, up to its first stop id and its limit."""
    requests, draft, running = state.requests, draft_of(state), state.running
    accepted, places = verdict.accepted[:, None], jnp.arange(proposals.shape[1] + 1)[None, :]
    new = jnp.pad(proposals, ((0, 0), (0, 1)))
    new = jnp.where(places == accepted, verdict.following[:, None], new)
    is_stop = jnp.any(new[:, :, None] == requests.stop_ids[:, None, :], axis=2)
    ends_here = is_stop & (places <= accepted)
    until_stop = jnp.argmax(ends_here, axis=1).astype(jnp.int32) + 1
    room = jnp.minimum(verdict.accepted + 1, requests.limits - state.lengths)
    ended = jnp.any(ends_here, axis=1) & (until_stop <= room)
    gained = jnp.where(running, jnp.where(ended, until_stop, room), 0)
    # Proposals beyond a row's end were not decided upon, as far as the row is concerned.
    kept = jnp.minimum(verdict.accepted, gained)
    judged = jnp.minimum(jnp.minimum(verdict.accepted + 1, count), gained)
    read = state.lengths + jnp.minimum(count, gained) - 1
    return state.extended(new, gained, stopped=ended)._replace(
        draft=DraftState(
            cache=draft.cache,
            lengths=jnp.where(running, read, draft.lengths),
            judged=draft.judged + judged,
            accepted=draft.accepted + kept,
            recent_judged=remember(draft.recent_judged, judged),
            recent_accepted=remember(draft.recent_accepted, kept),
        ),
    )
