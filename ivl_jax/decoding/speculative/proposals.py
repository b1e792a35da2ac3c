"""What a draft proposes: tokens one after the other, each read by the value networks too.

In: a state with a draft's part, and how many tokens to propose. Out: a `Block` of them, and the
state with what draft and values have read.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import NetworkLogits, compose, head_logits, run_values
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.generate import run_draft
from ivl_jax.decoding.device.state import DecodeState, DraftState
from ivl_jax.decoding.speculative.acceptance import propose
from ivl_jax.decoding.speculative.draft_length import LONGEST
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.kv_cache import KVCache

# Tokens that the draft reads at once where it has fallen behind.
_CATCH_UP = 16


class Block(NamedTuple):
    """What a round proposes; the places from the round's length on are empty."""

    tokens: Int[Array, "B K"]
    """Token ids."""
    q_logits: Float[Array, "B K V"]
    """Of `propose`."""
    value_logits: tuple[Float[Array, "B K Vv"], ...]
    """What each value network adds to the prediction that each proposal is judged by."""


def propose_block(
    composition: Composition, params: ComposedParams, state: DecodeState, count: Int[Array, ""]
) -> tuple[Block, DecodeState]:
    """Let the draft propose tokens; the values read all but the last of them.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        state: where the rows are.
        count: how many tokens are proposed.

    Returns:
        The proposals, and the state with the caches of draft and values.
    """
    network, base = composition.draft, composition.base
    assert network is not None
    arrays = params.draft
    assert arrays is not None
    requests, draft = state.requests, draft_of(state)
    # The same value networks on the draft, over the tokens that base and draft both have.
    known_to_both = min(network.vocab_size, base.vocab_size)
    on_draft = Composition(
        dataclasses.replace(network, vocab_size=known_to_both), composition.values
    )
    last = state.last_positions
    ends = jnp.stack([jnp.maximum(last - 1, 0), last], axis=1)

    def propose_one(
        index: Int[Array, ""], carry: tuple[Block, Array, KVCache, tuple[KVCache, ...]]
    ) -> tuple[Block, Array, KVCache, tuple[KVCache, ...]]:
        block, pair, draft_cache, value_caches = carry
        # The token before is read again: after a block kept whole the draft has not read it yet.
        hidden, draft_cache = run_draft(
            composition, params, draft_cache, pair, positions=ends + index
        )
        draft_logits = head_logits(network, arrays.params, hidden[:, 1:])
        values, value_caches = run_values_ahead(
            composition, params, state, value_caches, pair[:, 1], index
        )
        composed = compose(
            on_draft,
            params.values,
            NetworkLogits(draft_logits, values),
            strengths=requests.strengths,
        )
        token, q_logits = propose(
            _fit(composed[:, 0], block.q_logits.shape[-1]),
            requests.sampling,
            requests.keys,
            state.lengths - requests.prompt_lengths + index,
        )
        new = Block(token, q_logits, tuple(logits[:, 0] for logits in values))
        block = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, axis=1),
            block,
            new,
        )
        return block, jnp.stack([pair[:, 1], token], axis=1), draft_cache, value_caches

    block = _empty_block(composition, params, state)
    pair = jnp.take_along_axis(state.tokens, ends, axis=1)
    carry = (block, pair, draft.cache, state.caches.values)
    block, _, cache, value_caches = jax.lax.fori_loop(0, count, propose_one, carry)
    return block, state._replace(
        caches=state.caches._replace(values=value_caches), draft=draft._replace(cache=cache)
    )


def catch_up(composition: Composition, params: ComposedParams, state: DecodeState) -> DecodeState:
    """Let the draft read what was generated without it, but for the last two tokens.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        state: where the rows are.

    Returns:
        The state with the draft's cache.
    """
    tokens, lengths, draft = state.tokens, state.lengths, draft_of(state)

    def behind(carry: tuple[KVCache, Int[Array, " B"]]) -> Bool[Array, ""]:
        return jnp.any(state.running & (carry[1] < lengths - 2))

    def read(carry: tuple[KVCache, Int[Array, " B"]]) -> tuple[KVCache, Int[Array, " B"]]:
        cache, done = carry
        positions = done[:, None] + jnp.arange(_CATCH_UP, dtype=jnp.int32)[None, :]
        # What is read beyond a row's end lies where later tokens will be written.
        text = jnp.take_along_axis(tokens, positions, axis=1, mode="clip")
        cache = run_draft(composition, params, cache, text, positions=positions)[1]
        return cache, jnp.minimum(done + _CATCH_UP, lengths - 1)

    cache, done = jax.lax.while_loop(behind, read, (draft.cache, draft.lengths))
    return state._replace(draft=draft._replace(cache=cache, lengths=done))


def run_values_ahead(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    caches: tuple[KVCache, ...],
    tokens: Int[Array, " B"],
    index: Int[Array, ""],
) -> tuple[tuple[Array, ...], tuple[KVCache, ...]]:
    """Let the value networks read one token a row, at its last place or beyond.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        caches: what the value networks have read.
        tokens: [B] what they read.
        index: places after each row's last one.

    Returns:
        Logits [B 1 Vv] of each value network, and the new caches.
    """
    hidden, caches_after = run_values(
        composition,
        params.values,
        tokens[:, None],
        positions=(state.last_positions + index)[:, None],
        caches=caches,
    )
    assert caches_after is not None
    each = zip(composition.values, params.values, hidden, strict=True)
    logits = tuple(head_logits(network, value.params, states) for network, value, states in each)
    return logits, caches_after


def draft_of(state: DecodeState) -> DraftState:
    """The draft's part of a state that has one."""
    assert state.draft is not None
    return state.draft


def _empty_block(composition: Composition, params: ComposedParams, state: DecodeState) -> Block:
    """Room for the longest block."""
    longest = composition.draft_length or LONGEST
    last, index = state.lengths, jnp.int32(0)
    values, _ = jax.eval_shape(
        functools.partial(run_values_ahead, composition),
        params,
        state,
        state.caches.values,
        last,
        index,
    )
    base = composition.base
    assert isinstance(base.arch, ArchConfig)
    hidden = jnp.zeros((1, 1, base.arch.hidden_size), jnp.float32)
    base_logits = jax.eval_shape(functools.partial(head_logits, base), params.base, hidden)
    places = (state.lengths.shape[0], longest)
    return Block(
        jnp.zeros(places, jnp.int32),
        jnp.zeros((*places, base_logits.shape[-1]), jnp.float32),
        tuple(jnp.zeros((*places, logits.shape[-1]), jnp.float32) for logits in values),
    )


def _fit(logits: Float[Array, "B V"], width: int) -> Float[Array, "B W"]:
    """The draft's logits in the base's columns; both have the same tokens, then padding."""
    more = max(width - logits.shape[1], 0)
    return jnp.pad(logits, ((0, 0), (0, more)), constant_values=-jnp.inf)[:, :width]
