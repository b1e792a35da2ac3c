"""A small base model as a proposer: one token after the other, each read by the value networks.

In: a composition with a draft, which is a small base under the same value networks. Out:
`DRAFT_PROPOSER`. The value networks read only text (the residual scheme), so what
they say while tokens are proposed also counts when these are verified.

Value networks with their own vocabularies take no part in proposing: only the host can re-tokenise
for them. They read what the draft and the others propose in `mapped_rounds`, as all others then do.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import NetworkLogits, head_logits, run_cached
from ivl_jax.composed.network import (
    ComposedParams,
    Composition,
    DraftArrays,
    Network,
    known_tokens,
)
from ivl_jax.decoding.device.generate import compose_requested
from ivl_jax.decoding.device.proposals import (
    PassSeconds,
    Proposals,
    Proposer,
    longest_round,
)
from ivl_jax.decoding.device.sampling import are_finite
from ivl_jax.decoding.device.shardings import cache_sharding
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.speculative.acceptance import propose
from ivl_jax.decoding.speculative.values_ahead import empty_value_logits, run_values_ahead
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.kv_cache import KVCache, init_cache
from ivl_jax.sharding import replicated

CATCH_UP = 16
"""Tokens that the draft reads at once where it has fallen behind."""


class DraftCache(NamedTuple):
    """What a draft has read of each row."""

    cache: KVCache
    """Its keys and values of each row's first lengths[b] tokens, [B K S H] a layer."""
    lengths: Int[Array, " B"]
    """Tokens it has read; it falls behind where nothing is proposed."""


def _empty(composition: Composition, rows: int, capacity: int) -> DraftCache:
    network = _network_of(composition)
    dtype = jnp.dtype(network.cache_dtype)
    cache = init_cache(network.arch, batch_size=rows, capacity=capacity, dtype=dtype, rings=True)
    return DraftCache(cache, jnp.zeros(rows, jnp.int32))


def _read_prompts(
    composition: Composition,
    params: ComposedParams,
    own: DraftCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
) -> DraftCache:
    cache = run_draft(
        composition, params, own.cache, tokens, positions=positions, prompt_lengths=lengths
    )[1]
    return DraftCache(cache, positions[:, -1] + 1 if lengths is None else lengths)


def _available(state: DecodeState) -> Int[Array, " B"]:
    return jnp.full_like(state.lengths, state.tokens.shape[1])


def _propose(
    composition: Composition, params: ComposedParams, state: DecodeState, count: Int[Array, ""]
) -> tuple[Proposals, DecodeState]:
    """Propose tokens; value networks that read the base's tokens read all but the last of them."""
    state = _catch_up(composition, params, state)
    network, base = _network_of(composition), composition.base
    arrays, own = _arrays_of(params), _own(state)
    shared, shared_params, rows = _of_shared_vocabulary(composition, params, state)
    requests = rows.requests
    # The same value networks on the draft, over the tokens that base and draft both have.
    known_to_both = min(network.vocab_size, base.vocab_size)
    on_draft = Composition(dataclasses.replace(network, vocab_size=known_to_both), shared.values)
    last = state.last_positions
    ends = jnp.stack([jnp.maximum(last - 1, 0), last], axis=1)

    def propose_one(
        index: Int[Array, ""], carry: tuple[_Block, Array, KVCache, tuple[KVCache, ...]]
    ) -> tuple[_Block, Array, KVCache, tuple[KVCache, ...]]:
        block, pair, draft_cache, value_caches = carry
        # The token before is read again: after a block accepted whole the draft has not read it.
        hidden, draft_cache = run_draft(
            composition, params, draft_cache, pair, positions=ends + index
        )
        draft_logits = head_logits(network, arrays.params, hidden[:, 1:])
        values, value_caches = run_values_ahead(
            shared, shared_params, rows, value_caches, pair[:, 1:], index
        )
        parts = NetworkLogits(draft_logits, values)
        composed = compose_requested(on_draft, shared_params, parts, requests)
        logits = _fit(composed[:, 0], block.q_logits.shape[-1])
        token, q_logits = propose(
            logits,
            requests.sampling,
            requests.keys,
            state.lengths - requests.prompt_lengths + index,
        )
        new = _Block(token, ~are_finite(logits), q_logits, tuple(each[:, 0] for each in values))
        block = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, axis=1),
            block,
            new,
        )
        return block, jnp.stack([pair[:, 1], token], axis=1), draft_cache, value_caches

    block = _empty_block(shared, shared_params, rows)
    pair = jnp.take_along_axis(state.tokens, ends, axis=1)
    carry = (block, pair, own.cache, rows.caches.values)
    block, _, cache, read = jax.lax.fori_loop(0, count, propose_one, carry)
    proposals = Proposals(
        tokens=block.tokens,
        counts=jnp.full_like(state.lengths, count),
        failed=jnp.any(block.failed, axis=1),
        q_logits=block.q_logits,
        value_logits=None if composition.mapped else block.value_logits,
    )
    each, following = zip(composition.values, state.caches.values, strict=True), iter(read)
    values = tuple(held if value.mapped else next(following) for value, held in each)
    state = state._replace(caches=state.caches._replace(values=values))
    return proposals, _with_own(state, own._replace(cache=cache))


def _settle(state: DecodeState, count: Int[Array, ""], gained: Int[Array, " B"]) -> DraftCache:
    """It has read every proposal but the last, of which a row keeps no more than it gained."""
    own = _own(state)
    read = state.lengths + jnp.minimum(count, gained) - 1
    return own._replace(lengths=jnp.where(state.running, read, own.lengths))


def _seconds(
    composition: Composition, params: ComposedParams, pass_seconds: PassSeconds, rows: int
) -> float:
    """A pass over two tokens per row."""
    return pass_seconds(_network_of(composition), _arrays_of(params).params, 2 * rows)


def _shardings(composition: Composition) -> DraftCache:
    network = _network_of(composition)
    assert network.layout is not None
    parts = (cache_sharding(network), replicated(network.layout.mesh))
    return DraftCache(*parts)  # pyright: ignore[reportArgumentType]


DRAFT_PROPOSER = Proposer(
    name="the draft",
    empty=_empty,
    read_prompts=_read_prompts,
    available=_available,
    propose=_propose,
    settle=_settle,
    seconds=_seconds,
    shardings=_shardings,
    runs_values=True,
)
"""The draft of a composition."""


def run_draft(
    composition: Composition,
    params: ComposedParams,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Run the draft over tokens, up to its head.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        cache: what the draft has read.
        tokens: [B T] ids of the base.
        positions: [B T] position of each token, and its slot in the cache.
        prompt_lengths: [B] real tokens of each row, where these are its first; None: it continues.

    Returns:
        Hidden states [B T D] for its head, and the new cache.
    """
    draft, arrays = _network_of(composition), _arrays_of(params)
    known = known_tokens(draft, tokens, arrays.unknown_ids)
    return run_cached(
        draft, arrays.params, cache, known, positions=positions, prompt_lengths=prompt_lengths
    )


class _Block(NamedTuple):
    """Proposals as they are made."""

    tokens: Int[Array, "B K"]
    failed: Bool[Array, "B K"]
    q_logits: Float[Array, "B K V"]
    value_logits: tuple[Float[Array, "B K Vv"], ...]


def _of_shared_vocabulary(
    composition: Composition, params: ComposedParams, state: DecodeState
) -> tuple[Composition, ComposedParams, DecodeState]:
    """The same rows under those value networks alone that read the base's tokens."""
    if not composition.mapped:
        return composition, params, state
    places = [index for index, network in enumerate(composition.values) if not network.mapped]
    requests, caches = state.requests, state.caches
    strengths = jnp.take(requests.strengths, jnp.asarray(places, jnp.int32), axis=1)
    return (
        dataclasses.replace(composition, values=tuple(composition.values[i] for i in places)),
        params._replace(values=tuple(params.values[i] for i in places)),
        state._replace(
            requests=requests._replace(strengths=strengths),
            caches=caches._replace(values=tuple(caches.values[i] for i in places)),
        ),
    )


def _empty_block(composition: Composition, params: ComposedParams, state: DecodeState) -> _Block:
    """Room for the longest block."""
    rows, longest = len(state.lengths), longest_round(composition)
    base = composition.base
    assert isinstance(base.arch, ArchConfig)
    hidden = jnp.zeros((1, 1, base.arch.hidden_size), jnp.float32)
    columns = jax.eval_shape(lambda: head_logits(base, params.base, hidden)).shape[-1]
    return _Block(
        jnp.zeros((rows, longest), jnp.int32),
        jnp.zeros((rows, longest), bool),
        jnp.zeros((rows, longest, columns), jnp.float32),
        empty_value_logits(composition, params, state, places=longest),
    )


def _catch_up(composition: Composition, params: ComposedParams, state: DecodeState) -> DecodeState:
    """Let the draft read what was generated without it, but for the last two tokens."""
    tokens, lengths, own = state.tokens, state.lengths, _own(state)

    def behind(own: DraftCache) -> Bool[Array, ""]:
        return jnp.any(state.running & (own.lengths < lengths - 2))

    def read(own: DraftCache) -> DraftCache:
        positions = own.lengths[:, None] + jnp.arange(CATCH_UP, dtype=jnp.int32)[None, :]
        # What is read beyond a row's end is in slots that later tokens will overwrite.
        text = jnp.take_along_axis(tokens, positions, axis=1, mode="clip")
        cache = run_draft(composition, params, own.cache, text, positions=positions)[1]
        return DraftCache(cache, jnp.minimum(own.lengths + CATCH_UP, lengths - 1))

    return _with_own(state, jax.lax.while_loop(behind, read, own))


def _fit(logits: Float[Array, "B V"], width: int) -> Float[Array, "B W"]:
    """The draft's logits in the base's columns; both have the same tokens, then padding."""
    more = max(width - logits.shape[1], 0)
    return jnp.pad(logits, ((0, 0), (0, more)), constant_values=-jnp.inf)[:, :width]


def _network_of(composition: Composition) -> Network:
    assert composition.draft is not None
    return composition.draft


def _arrays_of(params: ComposedParams) -> DraftArrays:
    assert params.draft is not None
    return params.draft


def _own(state: DecodeState) -> DraftCache:
    assert state.speculation is not None
    return state.speculation.proposer


def _with_own(state: DecodeState, own: DraftCache) -> DecodeState:
    assert state.speculation is not None
    return state._replace(speculation=state.speculation._replace(proposer=own))
