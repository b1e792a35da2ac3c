"""Lossless speculative decoding: a proposer proposes tokens, base and values verify them at once.

In: a composition, a proposer, and a `DecodeState` that has its part. Out: the state with
more tokens: those of plain decoding, or samples from the same distribution.

Value networks read only text (the residual scheme), so they can read proposals before these are
verified. A round costs the proposing, a pass of the base over the block, and either a pass of the
values over it too, or what the proposer itself has run of them and a last pass over one token where
all proposals were accepted.

    proposing   token t → p₁ … pₖ, perhaps with z_value at t … pₖ₋₁
    verifying   z_base over (t, p₁ … pₖ) + Σ α z_value → how many are accepted, and what follows

Greedy tokens can differ from plain decoding's only at a near-tie: a block of tokens is summed in
another order than one token, which moves float32 logits by about 1e-5. The block's arg-max is then
what counts, the lowest id among equals.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import NetworkLogits, head_logits, run_cached
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.generate import compose_requested, decode_step, halt
from ivl_jax.decoding.device.log_probs import empty_log_probs, score_chosen
from ivl_jax.decoding.device.proposals import (
    BLOCK_WIDTHS,
    LONGEST,
    Proposals,
    Proposer,
)
from ivl_jax.decoding.device.sampling import are_finite, sample_tokens
from ivl_jax.decoding.device.state import DecodeState, LogProbs, SpeculationState
from ivl_jax.decoding.speculative.acceptance import verify
from ivl_jax.decoding.speculative.draft_length import (
    block_width,
    choose_length,
    remember,
    round_costs,
)
from ivl_jax.decoding.speculative.in_place import when
from ivl_jax.decoding.speculative.values_ahead import empty_value_logits, run_values_ahead
from ivl_jax.model.kv_cache import KVCache

# The width of the block for each number of proposals.
_WIDTHS = tuple(block_width(count) for count in range(LONGEST + 1))


class BlockLogits(NamedTuple):
    """What the networks say at the last token and at every proposal after it."""

    base: Float[Array, "B L V"]
    values: tuple[Float[Array, "B L Vv"], ...] | None
    """None: the proposer has run the value networks, but over the last proposal."""


class _Outcome(NamedTuple):
    """What becomes of the proposals."""

    accepted: Int[Array, " B"]
    """How many are accepted, from the first on."""
    following: Int[Array, " B"]
    """The composition's own token after them."""
    failed: Bool[Array, " B"]
    """Whether the logits after them were not finite: then nothing follows."""
    log_probs: LogProbs | None
    """Of the accepted tokens and the following one, L places, where the state has them."""


def speculate_chunk(
    composition: Composition,
    params: ComposedParams,
    proposer: Proposer,
    state: DecodeState,
    *,
    max_tokens: Int[Array, ""],
    stopped: Bool[Array, " B"],
    enough_done: Int[Array, ""],
) -> DecodeState:
    """Generate as `generate.decode_chunk` does; a row may get a few tokens more than it asks.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        proposer: where proposals come from.
        state: where the rows are.
        max_tokens: tokens per row, before the last round.
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
        return speculate(composition, params, proposer, state)

    return jax.lax.while_loop(unfinished, one_round, halt(state, stopped))


def speculate(
    composition: Composition, params: ComposedParams, proposer: Proposer, state: DecodeState
) -> DecodeState:
    """One round: propose some tokens, verify them, append those accepted and the one that follows.

    Where proposing does not pay, or a row has room for one token only, it is a plain step.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        proposer: where proposals come from.
        state: where the rows are.

    Returns:
        The state with one token more per running row, or up to as many as were proposed and one.
    """
    count = count_proposals(composition, params, proposer, state)
    step = functools.partial(_step, composition, params)
    whole_round = functools.partial(_round, composition, params, proposer, count)
    state = when(count == 0, step, state)
    return when(count > 0, whole_round, state)


def _step(composition: Composition, params: ComposedParams, state: DecodeState) -> DecodeState:
    """One plain step, where proposing does not pay."""
    return without_proposals(decode_step(composition, params, state))


def without_proposals(state: DecodeState) -> DecodeState:
    """The state after a step without proposals: what was learned of the proposer fades."""
    learned = _speculation(state)
    nothing = jnp.zeros_like(learned.proposed)
    return state._replace(
        speculation=learned._replace(
            recent_proposed=remember(learned.recent_proposed, nothing),
            recent_accepted=remember(learned.recent_accepted, nothing),
        )
    )


def _round(
    composition: Composition,
    params: ComposedParams,
    proposer: Proposer,
    count: Int[Array, ""],
    state: DecodeState,
) -> DecodeState:
    """Propose `count` tokens, at least one, and verify them."""
    proposals, state = proposer.propose(composition, params, state, count)
    logits, state = _read_block(composition, params, state, proposals, count)
    outcome, state = verify_block(composition, params, state, proposals, logits, count)
    return append_outcome(proposer, state, proposals, outcome, count)


def count_proposals(
    composition: Composition, params: ComposedParams, proposer: Proposer, state: DecodeState
) -> Int[Array, ""]:
    """How many tokens are proposed, the same for all rows."""
    count, learned = jnp.int32(composition.draft_length), _speculation(state)
    available = proposer.available(state)
    if not composition.draft_length:
        count = choose_length(
            round_costs(composition, params, proposer, batch=state.lengths.shape[0]),
            proposed=learned.recent_proposed,
            accepted=learned.recent_accepted,
            available=available,
            running=state.running,
        )
    # The last token of a row needs no proposal before it.
    room = jnp.minimum(state.requests.limits - state.lengths - 1, available)
    return jnp.minimum(count, jnp.max(jnp.where(state.running, room, 0)))


def _read_block(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    proposals: Proposals,
    count: Int[Array, ""],
) -> tuple[BlockLogits, DecodeState]:
    """Let the base, and values that have not, read the last token and the proposals; L = K + 1."""
    base = composition.base
    tokens = jnp.concatenate([state.last_tokens[:, None], proposals.tokens], axis=1)

    def of_width(
        width: int, carry: tuple[BlockLogits, KVCache, tuple[KVCache, ...]]
    ) -> tuple[BlockLogits, KVCache, tuple[KVCache, ...]]:
        read, cache, value_caches = carry
        block = tokens[:, :width]
        positions = state.last_positions[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
        hidden, cache = run_cached(base, params.base, cache, block, positions=positions)
        logits, values = head_logits(base, params.base, hidden), None
        if read.values is not None:
            values, value_caches = run_values_ahead(
                composition, params, state, value_caches, block, jnp.int32(0)
            )
        new = BlockLogits(logits, values)
        read = jax.tree.map(
            lambda all_, some: jax.lax.dynamic_update_slice(all_, some, (0, 0, 0)), read, new
        )
        return read, cache, value_caches

    widths, chosen = BLOCK_WIDTHS[1:], jnp.asarray(_WIDTHS, jnp.int32)[count]
    if composition.draft_length:
        widths = (composition.draft_length + 1,)
        chosen = jnp.int32(widths[0])
    read = _empty_logits(composition, params, state, proposals, widths[-1])
    carry = (read, state.caches.base, state.caches.values)
    for width in widths:
        carry = when(chosen == width, functools.partial(of_width, width), carry)
    read, cache, value_caches = carry
    return read, state._replace(caches=state.caches._replace(base=cache, values=value_caches))


def _empty_logits(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    proposals: Proposals,
    places: int,
) -> BlockLogits:
    base = composition.base
    token = state.last_tokens[:, None]
    run = functools.partial(run_cached, base, params.base, state.caches.base, token)
    hidden, _ = jax.eval_shape(run, positions=token)
    head = functools.partial(head_logits, base, params.base)
    columns = jax.eval_shape(head, hidden).shape[-1]
    values = None
    if proposals.value_logits is None:
        values = empty_value_logits(composition, params, state, places=places)
    return BlockLogits(jnp.zeros((len(token), places, columns), jnp.float32), values)


def verify_block(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    proposals: Proposals,
    logits: BlockLogits,
    count: Int[Array, ""],
    *,
    caps: Int[Array, " B"] | None = None,
) -> tuple[_Outcome, DecodeState]:
    """Verify the proposals from the first on, and choose the token that follows those accepted.

    Only `caps` of a row's logits are right beyond its last token's, if it is given: the proposal
    after as many is that token where it is accepted, and nothing follows it.

    Values that the proposer runs read the last one only where a row's proposals were all accepted,
    as they would in plain decoding.
    """
    requests, top = state.requests, state.top_log_probs
    indices = state.lengths - requests.prompt_lengths
    values_there = logits.values if proposals.value_logits is None else proposals.value_logits
    assert values_there is not None

    def composed(place: Int[Array, ""], values: tuple[Array, ...]) -> Float[Array, "B V"]:
        parts = NetworkLogits(_at(logits.base, place)[:, None], values)
        return compose_requested(composition, params, parts, requests)[:, 0]

    def scored(
        held: LogProbs | None, place: Int[Array, ""], at: Float[Array, "B V"], tokens: Array
    ) -> LogProbs | None:
        if held is None or top is None:
            return None
        new = score_chosen(at, _at(logits.base, place), tokens, top=top)
        return jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, place, axis=1),
            held,
            new,
        )

    def some_left(carry: tuple[Int[Array, ""], Bool[Array, " B"], _Outcome]) -> Bool[Array, ""]:
        return (carry[0] < count) & jnp.any(carry[1])

    def verify_one(
        carry: tuple[Int[Array, ""], Bool[Array, " B"], _Outcome],
    ) -> tuple[Int[Array, ""], Bool[Array, " B"], _Outcome]:
        place, left, outcome = carry
        at = composed(place, tuple(_at(each, place)[:, None] for each in values_there))
        proposed = _at(proposals.tokens, place)
        q_logits = None if proposals.q_logits is None else _at(proposals.q_logits, place)
        accepted, replacement = verify(
            proposed, q_logits, at, requests.sampling, requests.keys, indices + place
        )
        here, finite = jnp.where(accepted, proposed, replacement), are_finite(at)
        goes_on = left & accepted & finite
        if caps is not None:
            goes_on &= place < caps
        outcome = _Outcome(
            outcome.accepted + goes_on.astype(jnp.int32),
            jnp.where(left & ~goes_on, here, outcome.following),
            outcome.failed | (left & ~finite),
            scored(outcome.log_probs, place, at, here),
        )
        return place + 1, goes_on, outcome

    def follow(
        carry: tuple[_Outcome, tuple[KVCache, ...]],
    ) -> tuple[_Outcome, tuple[KVCache, ...]]:
        outcome, caches = carry
        if logits.values is None:
            last = _at(proposals.tokens, count - 1)[:, None]
            values, caches = run_values_ahead(composition, params, state, caches, last, count)
        else:
            values = tuple(_at(each, count)[:, None] for each in logits.values)
        at = composed(count, values)
        chosen = sample_tokens(at, requests.sampling, requests.keys, indices + count)
        return (
            _Outcome(
                outcome.accepted,
                jnp.where(left, chosen, outcome.following),
                outcome.failed | (left & ~are_finite(at)),
                scored(outcome.log_probs, count, at, chosen),
            ),
            caches,
        )

    nothing = jnp.zeros_like(state.lengths)
    failed = state.running & proposals.failed
    places = logits.base.shape[1]
    kept = None if top is None else empty_log_probs(len(nothing), places, top=top)
    begin = (jnp.int32(0), state.running & ~failed, _Outcome(nothing, nothing, failed, kept))
    _, left, outcome = jax.lax.while_loop(some_left, verify_one, begin)
    outcome, caches = when(jnp.any(left), follow, (outcome, state.caches.values))
    return outcome, state._replace(caches=state.caches._replace(values=caches))


def append_outcome(
    proposer: Proposer,
    state: DecodeState,
    proposals: Proposals,
    outcome: _Outcome,
    count: Int[Array, ""],
) -> DecodeState:
    """Append to each running row what was accepted, up to its first stop id and its limit."""
    requests, learned, running = state.requests, _speculation(state), state.running
    accepted = outcome.accepted[:, None]
    places = jnp.arange(proposals.tokens.shape[1] + 1)[None, :]
    new = jnp.pad(proposals.tokens, ((0, 0), (0, 1)))
    new = jnp.where(places == accepted, outcome.following[:, None], new)
    available = outcome.accepted + 1 - outcome.failed.astype(jnp.int32)
    is_stop = jnp.any(new[:, :, None] == requests.stop_ids[:, None, :], axis=2)
    ends_here = is_stop & (places < available[:, None])
    until_stop = jnp.argmax(ends_here, axis=1).astype(jnp.int32) + 1
    room = jnp.minimum(available, requests.limits - state.lengths)
    ended = jnp.any(ends_here, axis=1) & (until_stop <= room)
    gained = jnp.where(running, jnp.where(ended, until_stop, room), 0)
    # Tokens beyond a row's end do not count for the row.
    has_room = state.lengths + gained < requests.limits
    failed = outcome.failed & ~ended & has_room
    meant = proposals.counts
    kept = jnp.minimum(jnp.minimum(outcome.accepted, meant), gained)
    verified = jnp.minimum(jnp.minimum(outcome.accepted + 1, meant), gained)
    return state.extended(
        new, gained, stopped=ended, failed=failed, log_probs=outcome.log_probs
    )._replace(
        speculation=SpeculationState(
            proposer=proposer.settle(state, count, gained),
            proposed=learned.proposed + verified,
            accepted=learned.accepted + kept,
            recent_proposed=remember(learned.recent_proposed, verified),
            recent_accepted=remember(learned.recent_accepted, kept),
        ),
    )


def _at(places: Array, place: Int[Array, ""]) -> Array:
    """One place of [B L …]."""
    return jax.lax.dynamic_index_in_dim(places, place, axis=1, keepdims=False)


def _speculation(state: DecodeState) -> SpeculationState:
    """The proposer's part of a state that has one."""
    assert state.speculation is not None
    return state.speculation
