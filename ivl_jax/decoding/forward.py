"""One pass of a composition's networks over tokens: what prefill, decoding and verifying share.

In: the networks' arrays and caches, tokens and their positions. Out: composed logits, or each
network's own part of them, and the new caches. All functions are pure.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ivl_jax.composition import ValueTerm, compose_logits, value_hidden
from ivl_jax.decoding.state import ComposedParams, Composition, DecodeState, Network, Reading
from ivl_jax.model.decoder import Constrain, Params, hidden_states, logits_from_hidden
from ivl_jax.model.kv_cache import KVCache
from ivl_jax.sharding import activation_constraint


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
    hidden, base_cache = read_hidden(
        base, params.base, state.base_cache, tokens, positions=positions
    )
    base_logits = logits_from_hidden(base.graphdef, params.base, _pick(hidden, wanted))
    read_logits = None
    if any(network.connection != "residual" for network in composition.values):
        read_logits = logits_from_hidden(base.graphdef, params.base, hidden)
    terms, value_caches = read_values(
        composition,
        params,
        state.value_caches,
        tokens,
        strengths=state.requests.strengths,
        positions=positions,
        wanted=wanted,
        read_logits=read_logits,
        readings=readings,
    )
    composed = compose_logits(base_logits, terms, vocab_size=base.vocab_size)
    return composed, state._replace(base_cache=base_cache, value_caches=value_caches)


def read_hidden(
    network: Network,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Run a base, or the draft of one, over tokens, up to its head.

    Args:
        network: its static half.
        params: its parameters.
        cache: what it has read.
        tokens: [B T] token ids.
        positions: [B T] position of each token, and its slot in the cache.

    Returns:
        Hidden states [B T D] for its head, and the new cache.
    """
    hidden, cache_after = hidden_states(
        network.graphdef,
        params,
        tokens,
        positions=positions,
        cache=cache,
        constrain=constraint_of(network),
    )
    assert cache_after is not None
    return hidden, cache_after


def read_draft(
    composition: Composition,
    params: ComposedParams,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Run the draft over tokens, up to its head; as `read_hidden`.

    Args:
        composition: the static half, with a draft.
        params: the arrays of all networks.
        cache: what the draft has read.
        tokens: [B T] ids of the base.
        positions: [B T] position of each token, and its slot in the cache.

    Returns:
        Hidden states [B T D] for its head, and the new cache.
    """
    draft, unknown_ids = composition.draft, params.draft_unknown_ids
    assert draft is not None
    assert params.draft is not None
    assert unknown_ids is not None
    known = known_tokens(draft, tokens, unknown_ids)
    return read_hidden(draft, params.draft, cache, known, positions=positions)


def read_values(
    composition: Composition,
    params: ComposedParams,
    caches: tuple[KVCache, ...],
    tokens: Int[Array, "B T"],
    *,
    strengths: Float[Array, "B M"],
    positions: Int[Array, "B T"],
    wanted: Int[Array, "B C"],
    read_logits: Float[Array, "B T Vb"] | None = None,
    readings: tuple[Reading, ...] = (),
) -> tuple[tuple[ValueTerm, ...], tuple[KVCache, ...]]:
    """Run the value networks over tokens.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        caches: what each value network has read.
        tokens: [B T] token ids.
        strengths: [B M] α of each value network.
        positions: [B T] position of each token, and its slot in every cache.
        wanted: [B C] which of the T tokens' predictions are wanted (index into T).
        read_logits: the base's logits at all T tokens, where a scheme other than the residual one
            reads them.
        readings: as `read_tokens` takes them.

    Returns:
        One summand a value network, its logits [B C Vv], and the new caches.
    """
    terms, caches_after = [], []
    own = zip(readings, params.vocabulary_maps, strict=True)
    for index, network in enumerate(composition.values):
        value_params, unknown_ids = params.values[index], params.unknown_ids[index]
        assert network.connection is not None
        reading, vocabulary_map = next(own) if network.mapped else (None, None)
        if reading is None:
            value_tokens = known_tokens(network, tokens, unknown_ids)
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
            vocab_size=composition.base.vocab_size,
            positions=value_positions,
            cache=caches[index],
            constrain=constraint_of(network),
        )
        logits = logits_from_hidden(network.graphdef, value_params, _pick(hidden, value_wanted))
        terms.append(
            ValueTerm(
                logits,
                strengths[:, index],
                network.vocab_size,
                None if network.mapped else unknown_ids,
                vocabulary_map,
                network.centred,
            )
        )
        assert cache is not None
        caches_after.append(cache)
    return tuple(terms), tuple(caches_after)


def known_tokens(
    network: Network, tokens: Int[Array, "B T"], unknown_ids: Int[Array, " U"]
) -> Int[Array, "B T"]:
    """Replace the tokens that a network beside the base cannot read.

    Args:
        network: a value network, or the draft.
        tokens: [B T] ids of the base.
        unknown_ids: ids that mean something else to the network.

    Returns:
        [B T] ids that it knows.
    """
    unknown = (tokens >= network.vocab_size) | jnp.isin(tokens, unknown_ids)
    return jnp.where(unknown, jnp.int32(network.replacement_id), tokens)


def constraint_of(network: Network) -> Constrain | None:
    """The sharding constraint for a network's activations; None on one device."""
    layout = network.layout
    return None if layout is None else activation_constraint(layout.mesh, layout.rules)


def _pick(hidden: Float[Array, "B T D"], wanted: Int[Array, "B C"]) -> Float[Array, "B C D"]:
    return jnp.take_along_axis(hidden, wanted[:, :, None], axis=1)
