"""Composed decoding as pure functions: read the prompts, then generate tokens one by one.

In: parameters of a base and of any number of value networks, and what each row asks for. Out: a
`DecodeState`, one record with everything a batch of rows is. All of it stays on device; the host
looks at a state when it wants to, not once a token.

Every network keeps slot = position in its cache, and a row of length n has its first n − 1 tokens
in every cache. So rolling a row back is setting a smaller length, and right padding needs no mask.

A value network with a vocabulary of its own reads the row's text in its own tokens, at its own
positions. Which those are the host says before each step (`Reading`): such a composition goes token
by token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composition import ValueTerm, compose_logits, value_hidden
from ivl_jax.decoding.sampling import sample_tokens
from ivl_jax.decoding.state import (
    ComposedParams,
    Composition,
    DecodeState,
    Network,
    Reading,
    Requests,
)
from ivl_jax.decoding.streaming import FinishReason
from ivl_jax.model.decoder import Constrain, hidden_states, logits_from_hidden
from ivl_jax.model.kv_cache import KVCache, init_cache
from ivl_jax.sharding import activation_constraint


def prefill(
    composition: Composition,
    params: ComposedParams,
    prompts: Int[Array, "B P"],
    requests: Requests,
    *,
    capacity: int,
    readings: tuple[Reading, ...] = (),
    mapped_capacity: int = 0,
) -> DecodeState:
    """Read the prompts into fresh caches and generate the first token of every row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        prompts: [B P] int32 token ids, right-padded with any id.
        requests: what each row asks for.
        capacity: slots a row has, S ≥ P (tokens).
        readings: the prompts as each value network with its own vocabulary reads them.
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
        base_cache=empty_cache(composition.base),
        value_caches=tuple(empty_cache(network) for network in composition.values),
    )
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    logits, state = read_tokens(
        composition,
        params,
        state,
        prompts,
        positions=positions,
        wanted=lengths[:, None] - 1,
        readings=readings,
    )
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
        done = jnp.sum(state.finish != FinishReason.RUNNING)
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
    readings: tuple[Reading, ...] = (),
) -> DecodeState:
    """Generate one token a running row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        readings: what each value network with its own vocabulary has to read, so that it has read
            the row's text so far.

    Returns:
        The state afterwards.
    """
    # A row that is done reads its last token again, into the slot where it already is.
    positions = state.lengths[:, None] - 1
    tokens = jnp.take_along_axis(state.tokens, positions, axis=1)
    logits, state = read_tokens(
        composition,
        params,
        state,
        tokens,
        positions=positions,
        wanted=jnp.zeros_like(tokens),
        readings=readings,
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
    halted = stopped & (state.finish == FinishReason.RUNNING)
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

    caches = [
        jax.tree.map(grown, cache) if network.mapped else cache
        for network, cache in zip(composition.values, state.value_caches, strict=True)
    ]
    return state._replace(value_caches=tuple(caches))


def read_tokens(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    wanted: Int[Array, "B C"],
    readings: tuple[Reading, ...] = (),
) -> tuple[Float[Array, "B C V"], DecodeState]:
    """Run base and value networks over tokens, and compose the logits where they are wanted.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: its caches are read and written; tokens and lengths are left alone.
        tokens: [B T] token ids.
        positions: [B T] position of each token, and its slot in every cache.
        wanted: [B C] which of the T tokens' predictions are composed (index into T).
        readings: what the value networks with their own vocabulary read, in their order; C is then
            1, for theirs is the prediction after the last of a row's tokens.

    Returns:
        Composed logits [B C V] in float32, and the state with new caches.
    """
    base = composition.base
    hidden, base_cache = hidden_states(
        base.graphdef,
        params.base,
        tokens,
        positions=positions,
        cache=state.base_cache,
        constrain=_constraint(base),
    )
    base_logits = logits_from_hidden(base.graphdef, params.base, _pick(hidden, wanted))
    read_logits = None
    if any(network.connection != "residual" for network in composition.values):
        read_logits = logits_from_hidden(base.graphdef, params.base, hidden)
    terms, value_caches = [], []
    own = zip(readings, params.vocabulary_maps, strict=True)
    for index, network in enumerate(composition.values):
        value_params, unknown_ids = params.values[index], params.unknown_ids[index]
        assert network.connection is not None
        reading, vocabulary_map = next(own) if network.mapped else (None, None)
        if reading is None:
            value_tokens = _known_tokens(network, tokens, unknown_ids)
            value_positions, value_wanted = positions, wanted
        else:
            value_tokens = reading.tokens
            steps = jnp.arange(value_tokens.shape[1], dtype=jnp.int32)[None, :]
            value_positions = reading.starts[:, None] + steps
            value_wanted = reading.counts[:, None] - 1
        hidden, cache = value_hidden(
            network.connection,
            network.graphdef,
            value_params,
            value_tokens,
            base_logits=read_logits,
            vocab_size=base.vocab_size,
            positions=value_positions,
            cache=state.value_caches[index],
            constrain=_constraint(network),
        )
        logits = logits_from_hidden(network.graphdef, value_params, _pick(hidden, value_wanted))
        terms.append(
            ValueTerm(
                logits,
                state.requests.strengths[:, index],
                network.vocab_size,
                None if network.mapped else unknown_ids,
                vocabulary_map,
                network.centred,
            )
        )
        value_caches.append(cache)
    composed = compose_logits(base_logits, terms, vocab_size=base.vocab_size)
    return composed, state._replace(base_cache=base_cache, value_caches=tuple(value_caches))


def _append(state: DecodeState, logits: Float[Array, "B V"]) -> DecodeState:
    """Sample one token for each running row and update its length and finish reason."""
    requests = state.requests
    running = state.finish == FinishReason.RUNNING
    token_indices = state.lengths - requests.prompt_lengths
    chosen = sample_tokens(logits, requests.sampling, requests.keys, token_indices)
    capacity = state.tokens.shape[1]
    rows = jnp.arange(state.tokens.shape[0], dtype=jnp.int32)
    slots = jnp.where(running, state.lengths, capacity)
    lengths = state.lengths + running.astype(jnp.int32)
    ended = jnp.any(chosen[:, None] == requests.stop_ids, axis=1)
    reason = jnp.where(
        ended,
        jnp.int32(FinishReason.EOS),
        jnp.where(lengths >= requests.limits, jnp.int32(FinishReason.LENGTH), state.finish),
    )
    return state._replace(
        tokens=state.tokens.at[rows, slots].set(chosen, mode="drop"),
        lengths=lengths,
        finish=jnp.where(running, reason, state.finish),
    )


def _pick(hidden: Float[Array, "B T D"], wanted: Int[Array, "B C"]) -> Float[Array, "B C D"]:
    return jnp.take_along_axis(hidden, wanted[:, :, None], axis=1)


def _known_tokens(
    network: Network, tokens: Int[Array, "B T"], unknown_ids: Int[Array, " U"]
) -> Int[Array, "B T"]:
    """The tokens as a value network can read them: those it does not know are replaced."""
    unknown = (tokens >= network.vocab_size) | jnp.isin(tokens, unknown_ids)
    return jnp.where(unknown, jnp.int32(network.replacement_id), tokens)


def _constraint(network: Network) -> Constrain | None:
    layout = network.layout
    return None if layout is None else activation_constraint(layout.mesh, layout.rules)
