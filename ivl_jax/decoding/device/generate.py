"""Composed decoding as pure functions: read the prompts, then generate tokens one by one.

In: parameters of a base and of any number of value networks, and what each row asks for. Out: a
`DecodeState`, one record with everything a batch of rows is. All of it stays on device; the host
looks at a state when it wants to, not once a token.

Every network keeps slot = position in its cache, and a row of length n has its first n − 1 tokens
in every cache. So rolling a row back is setting a smaller length, and right padding needs no mask.

A value network with a vocabulary of its own reads the row's text in its own tokens, at its own
positions. The host says before each step which those are (`OwnTokens`): such a composition is
decoded token by token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import (
    Caches,
    OwnTokens,
    compose,
    network_logits,
    pick,
    run_networks,
)
from ivl_jax.composed.network import ComposedParams, Composition, Network, known_tokens
from ivl_jax.decoding.device.sampling import sample_tokens
from ivl_jax.decoding.device.state import DecodeState, DraftState, Requests
from ivl_jax.decoding.streaming import FinishReason
from ivl_jax.model.decoder import Params, hidden_states
from ivl_jax.model.kv_cache import KVCache, init_cache


def prefill(
    composition: Composition,
    params: ComposedParams,
    prompts: Int[Array, "B P"],
    requests: Requests,
    *,
    capacity: int,
    own_tokens: tuple[OwnTokens, ...] = (),
    mapped_capacity: int = 0,
) -> DecodeState:
    """Read the prompts into fresh caches and generate the first token of every row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        prompts: [B P] int32 token ids, right-padded with any id.
        requests: what each row asks for.
        capacity: slots a row has, S ≥ P (tokens).
        own_tokens: the prompts as each value network with its own vocabulary reads them.
        mapped_capacity: slots a row has in their caches (tokens).

    Returns:
        The state after one generated token; rows whose limit leaves no room are done at once.
    """
    batch, width = prompts.shape

    def empty_cache(network: Network) -> KVCache:
        slots = mapped_capacity if network.mapped else capacity
        dtype = jnp.dtype(network.cache_dtype)
        return init_cache(network.arch, batch_size=batch, capacity=slots, dtype=dtype)

    lengths = requests.prompt_lengths
    state = DecodeState(
        tokens=jnp.pad(prompts, ((0, 0), (0, capacity - width))),
        lengths=lengths,
        finish=jnp.where(
            lengths < requests.limits, int(FinishReason.RUNNING), int(FinishReason.LENGTH)
        ).astype(jnp.int32),
        requests=requests,
        caches=Caches(
            empty_cache(composition.base),
            tuple(empty_cache(network) for network in composition.values),
        ),
    )
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    logits, state = read_tokens(
        composition,
        params,
        state,
        prompts,
        positions=positions,
        wanted=lengths[:, None] - 1,
        own_tokens=own_tokens,
    )
    if composition.draft is not None:
        cache = empty_cache(composition.draft)
        cache = run_draft(composition, params, cache, prompts, positions=positions)[1]
        nothing = jnp.zeros(batch, jnp.int32)
        recent = jnp.zeros(batch, jnp.float32)
        draft = DraftState(cache, lengths, nothing, nothing, recent, recent)
        state = state._replace(draft=draft)
    return _append(state, logits[:, 0])


def decode_chunk(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    max_tokens: Int[Array, ""],
    stopped: Bool[Array, " B"],
    enough_done: Int[Array, ""],
) -> DecodeState:
    """Generate until enough rows are done, or every running row has `max_tokens` more.

    For compositions of one vocabulary.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        max_tokens: tokens a row, at most.
        stopped: [B], rows that the host has ended since the last chunk (a stop string).
        enough_done: rows that are done when it ends, those that were done before included: B, or
            fewer where prompts wait for the rows that they leave.

    Returns:
        The state afterwards.
    """

    def unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        count, state = carry
        done = jnp.sum(~state.running)
        return (count < max_tokens) & (done < enough_done)

    def one_token(
        carry: tuple[Int[Array, ""], DecodeState],
    ) -> tuple[Int[Array, ""], DecodeState]:
        count, state = carry
        return count + 1, decode_step(composition, params, state)

    return jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), halt(state, stopped)))[1]


def decode_step(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    own_tokens: tuple[OwnTokens, ...] = (),
) -> DecodeState:
    """Generate one token a running row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        own_tokens: what each value network with its own vocabulary has to read, so that it has read
            the row's text so far.

    Returns:
        The state afterwards.
    """
    # A row that is done reads its last token again, into the slot where it already is.
    tokens = state.last_tokens[:, None]
    logits, state = read_tokens(
        composition,
        params,
        state,
        tokens,
        positions=state.last_positions[:, None],
        wanted=jnp.zeros_like(tokens),
        own_tokens=own_tokens,
    )
    return _append(state, logits[:, 0])


def halt(state: DecodeState, stopped: Bool[Array, " B"]) -> DecodeState:
    """End running rows.

    Args:
        state: where the rows are.
        stopped: [B], which of them end.

    Returns:
        The state with these rows' finish reason; why they ended is the host's to know.
    """
    halted = stopped & state.running
    reason = jnp.int32(FinishReason.STOP_STRING)
    return state._replace(finish=jnp.where(halted, reason, state.finish))


def grow_mapped(
    composition: Composition, state: DecodeState, *, mapped_capacity: int
) -> DecodeState:
    """Give the value networks with their own vocabulary more slots.

    Args:
        composition: the static half.
        state: where the rows are.
        mapped_capacity: slots a row has afterwards, no fewer than before (tokens).

    Returns:
        The state with larger caches, what was in them included.
    """

    def grown(array: Array) -> Array:
        more = mapped_capacity - array.shape[-2]
        return jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0)))

    values = tuple(
        jax.tree.map(grown, cache) if network.mapped else cache
        for network, cache in zip(composition.values, state.caches.values, strict=True)
    )
    return state._replace(caches=state.caches._replace(values=values))


def read_tokens(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    wanted: Int[Array, "B C"],
    own_tokens: tuple[OwnTokens, ...] = (),
) -> tuple[Float[Array, "B C V"], DecodeState]:
    """Run base and value networks over tokens, and compose the logits where they are wanted.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: its caches are read and written; tokens and lengths are left alone.
        tokens: [B T] token ids.
        positions: [B T] position of each token, and its slot in every cache.
        wanted: [B C] which of the T tokens' predictions are composed (index into T).
        own_tokens: what each value network with its own vocabulary reads; C is then 1.

    Returns:
        Composed logits [B C V] in float32, and the state with new caches.
    """
    hidden, caches = run_networks(
        composition,
        params,
        tokens,
        positions=positions,
        caches=state.caches,
        own_texts=own_tokens,
    )
    assert caches is not None
    picked = pick(composition, hidden, wanted, own_tokens)
    logits = network_logits(composition, params, picked)
    composed = compose(composition, params.values, logits, strengths=state.requests.strengths)
    return composed, state._replace(caches=caches)


def run_draft(
    composition: Composition,
    params: ComposedParams,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Run the draft over tokens, up to its head.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        cache: what the draft has read.
        tokens: [B T] ids of the base.
        positions: [B T] position of each token, and its slot in the cache.

    Returns:
        Hidden states [B T D] for its head, and the new cache.
    """
    draft, arrays = composition.draft, params.draft
    assert draft is not None
    assert arrays is not None
    known = known_tokens(draft, tokens, arrays.unknown_ids)
    return run_cached(draft, arrays.params, cache, known, positions=positions)


def run_cached(
    network: Network,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Run a base, or its draft, over tokens, up to its head; as `run_draft`."""
    hidden, cache_after = hidden_states(
        network.graphdef,
        params,
        tokens,
        positions=positions,
        cache=cache,
        constrain=network.constrain,
    )
    assert cache_after is not None
    return hidden, cache_after


def _append(state: DecodeState, logits: Float[Array, "B V"]) -> DecodeState:
    """Sample one token for each running row and update its length and finish reason."""
    requests = state.requests
    token_indices = state.lengths - requests.prompt_lengths
    chosen = sample_tokens(logits, requests.sampling, requests.keys, token_indices)
    stopped = jnp.any(chosen[:, None] == requests.stop_ids, axis=1)
    return state.extended(chosen[:, None], state.running.astype(jnp.int32), stopped=stopped)
