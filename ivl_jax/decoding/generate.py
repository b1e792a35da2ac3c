"""Composed decoding as two pure programs: read the prompts, then generate tokens in chunks.

In: parameters of a base and of any number of value networks, and what each row asks for. Out: a
`DecodeState`, one record with everything a batch of rows is. All of it stays on device; the host
looks at a state when it wants to, not once a token.

Every network keeps slot = position in its cache, and a row of length n has its first n − 1 tokens
in every cache. So rolling a row back is setting a smaller length, and right padding needs no mask.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from ivl_jax.composition import ValueTerm, compose_logits, value_hidden
from ivl_jax.config import Connection
from ivl_jax.decoding.sampling import Sampling, row_keys, sample_tokens
from ivl_jax.decoding.streaming import FinishReason
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Constrain, Params, hidden_states, logits_from_hidden
from ivl_jax.model.kv_cache import KVCache, init_cache
from ivl_jax.sharding import BATCH_AXES, ShardingRules, activation_constraint, replicated


@dataclass(frozen=True)
class Layout:
    """Where one network's arrays live."""

    mesh: Mesh
    rules: ShardingRules


@dataclass(frozen=True)
class Network:
    """The static half of one network of a composition."""

    graphdef: nnx.GraphDef
    arch: ArchConfig
    vocab_size: int
    """Real tokens that the network knows; output columns after them are padding."""
    cache_dtype: str
    connection: Connection | None = None
    """None for the base."""
    replacement_id: int = 0
    """What a value network reads in place of a token it does not know."""
    layout: Layout | None = None
    """None: one device."""


@dataclass(frozen=True)
class Composition:
    """The static half of a composed decoder: hashable, the key of its compiled programs."""

    base: Network
    values: tuple[Network, ...] = ()


class ComposedParams(NamedTuple):
    """The arrays of a composed decoder; read by every step, never donated."""

    base: Params
    """Parameters of the base model."""
    values: tuple[Params, ...]
    """Parameters of each value network."""
    unknown_ids: tuple[Int[Array, " U"], ...]
    """For each value network: base ids that mean something else to it."""


class Requests(NamedTuple):
    """What each row asks for; constant while it is decoded."""

    prompt_lengths: Int[Array, " B"]
    """Tokens of the prompt, at least 1."""
    limits: Int[Array, " B"]
    """Length, prompt included, at which the row ends; 0 marks a row that only fills the batch."""
    stop_ids: Int[Array, "B E"]
    """Ids that end the row; −1 fills up."""
    strengths: Float[Array, "B M"]
    """α of each value network."""
    keys: Key[Array, " B"]
    """One key a row; the token index is folded in at each step."""
    sampling: Sampling
    """How the next token is chosen; four arrays [B]."""


class DecodeState(NamedTuple):
    """A batch of rows being decoded; row b's next token is sampled from its first lengths[b]."""

    tokens: Int[Array, "B S"]
    """Prompt, then what was generated; slot = position. Nothing is meant beyond a row's length."""
    lengths: Int[Array, " B"]
    """Tokens so far, prompt included."""
    finish: Int[Array, " B"]
    """A `FinishReason`; a row that is done keeps its tokens and its length."""
    requests: Requests
    """What each row asks for."""
    base_cache: KVCache
    """The base's keys and values of each row's first lengths[b] − 1 tokens, [B K S H] a layer."""
    value_caches: tuple[KVCache, ...]
    """The same for each value network."""


class Programs(NamedTuple):
    """The compiled programs of a composition."""

    prefill: Callable[..., DecodeState]
    """(params, prompts [B P], requests, capacity) → state whose rows have one generated token;
    `capacity` S is static."""
    decode_chunk: Callable[..., DecodeState]
    """(params, state, max_tokens, stopped [B]) → state; the state's buffers are donated."""
    row_keys: Callable[..., Array]
    """(seeds [B], rows [B]) → keys [B]."""


@functools.cache
def build_programs(composition: Composition) -> Programs:
    """Compile-once entry points of a composition: the one place where decoding is jitted.

    Kept for each composition: other parameters of the same architectures reuse what was compiled.

    Args:
        composition: the static half.

    Returns:
        `prefill` and `decode_chunk` under jit, shardings and donation said. Each compiles once a
        shape: batch, prompt bucket and capacity.
    """
    shardings = _state_shardings(composition)

    def prefill_program(
        params: ComposedParams, prompts: Int[Array, "B P"], requests: Requests, capacity: int
    ) -> DecodeState:
        return prefill(composition, params, prompts, requests, capacity=capacity)

    def chunk_program(
        params: ComposedParams,
        state: DecodeState,
        max_tokens: Int[Array, ""],
        stopped: Bool[Array, " B"],
    ) -> DecodeState:
        return decode_chunk(composition, params, state, max_tokens=max_tokens, stopped=stopped)

    return Programs(
        jax.jit(prefill_program, static_argnames="capacity", out_shardings=shardings),
        jax.jit(chunk_program, donate_argnames="state", out_shardings=shardings),
        jax.jit(row_keys),
    )


def prefill(
    composition: Composition,
    params: ComposedParams,
    prompts: Int[Array, "B P"],
    requests: Requests,
    *,
    capacity: int,
) -> DecodeState:
    """Read the prompts into fresh caches and generate the first token of every row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        prompts: [B P] int32 token ids, right-padded with any id.
        requests: what each row asks for.
        capacity: slots a row has, S ≥ P (tokens).

    Returns:
        The state after one generated token; rows whose limit leaves no room are done at once.
    """
    batch, width = prompts.shape

    def empty_cache(network: Network) -> KVCache:
        return init_cache(
            network.arch, batch_size=batch, capacity=capacity, dtype=jnp.dtype(network.cache_dtype)
        )

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
        composition, params, state, prompts, positions=positions, wanted=lengths[:, None] - 1
    )
    return _append(state, logits[:, 0])


def decode_chunk(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    *,
    max_tokens: Int[Array, ""],
    stopped: Bool[Array, " B"],
) -> DecodeState:
    """Generate until every row is done, or every running row has `max_tokens` more.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        max_tokens: tokens a row, at most.
        stopped: [B], rows in which the host has found a stop string since the last chunk.

    Returns:
        The state afterwards.
    """
    halted = stopped & (state.finish == FinishReason.RUNNING)
    state = state._replace(
        finish=jnp.where(halted, jnp.int32(FinishReason.STOP_STRING), state.finish)
    )

    def unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        count, state = carry
        return (count < max_tokens) & jnp.any(state.finish == FinishReason.RUNNING)

    def one_token(
        carry: tuple[Int[Array, ""], DecodeState],
    ) -> tuple[Int[Array, ""], DecodeState]:
        count, state = carry
        # A row that is done reads its last token again, into the slot where it already is.
        positions = state.lengths[:, None] - 1
        tokens = jnp.take_along_axis(state.tokens, positions, axis=1)
        logits, state = read_tokens(
            composition, params, state, tokens, positions=positions, wanted=jnp.zeros_like(tokens)
        )
        return count + 1, _append(state, logits[:, 0])

    return jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state))[1]


def read_tokens(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    wanted: Int[Array, "B C"],
) -> tuple[Float[Array, "B C V"], DecodeState]:
    """Run base and value networks over tokens, and compose the logits where they are wanted.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: its caches are read and written; tokens and lengths are left alone.
        tokens: [B T] token ids.
        positions: [B T] position of each token, and its slot in every cache.
        wanted: [B C] which of the T tokens' predictions are composed (index into T).

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
    for index, network in enumerate(composition.values):
        value_params, unknown_ids = params.values[index], params.unknown_ids[index]
        assert network.connection is not None
        hidden, cache = value_hidden(
            network.connection,
            network.graphdef,
            value_params,
            _known_tokens(network, tokens, unknown_ids),
            base_logits=read_logits,
            vocab_size=base.vocab_size,
            positions=positions,
            cache=state.value_caches[index],
            constrain=_constraint(network),
        )
        logits = logits_from_hidden(network.graphdef, value_params, _pick(hidden, wanted))
        strength = state.requests.strengths[:, index]
        terms.append(ValueTerm(logits, strength, network.vocab_size, unknown_ids))
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


def _state_shardings(composition: Composition) -> DecodeState | None:
    """Caches: rows over data × fsdp, kv heads as the network's layout says. The rest: whole."""
    if composition.base.layout is None:
        return None
    whole = replicated(composition.base.layout.mesh)
    shardings: dict[str, Any] = dict.fromkeys(DecodeState._fields, whole)
    shardings["base_cache"] = _cache_sharding(composition.base)
    shardings["value_caches"] = tuple(map(_cache_sharding, composition.values))
    return DecodeState(**shardings)


def _cache_sharding(network: Network) -> NamedSharding:
    layout = network.layout
    assert layout is not None
    axis = layout.rules.kv_heads
    if axis and network.arch.num_key_value_heads % layout.mesh.shape[axis]:
        axis = None
    return NamedSharding(layout.mesh, PartitionSpec(BATCH_AXES, axis, None, None))
