"""The forward pass of a composed model: the only one, for training, decoding and scoring.

In: the networks' arrays, tokens and their positions, optionally caches. Out: each network's final
hidden states; then, for as many positions at a time as the caller likes, each network's logits and
the composed ones. All functions are pure.

    run_networks   tokens → HiddenStates of every network (`run_network`: of one)
    network_logits HiddenStates → NetworkLogits of every network
    compose        NetworkLogits → composed logits

The logits [B T V] are by far the largest arrays, so they are computed only where the caller asks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ivl_jax.composed.head_copies import holds_copies, logits_of_copies
from ivl_jax.composed.network import (
    ComposedParams,
    Composition,
    Network,
    ValueArrays,
    known_tokens,
)
from ivl_jax.composed.own_prefixes import OwnPrefixes, run_prefixes
from ivl_jax.composed.strength_policies import RowPolicies, strength_shares
from ivl_jax.composition import SchemeInputs, compose_logits, value_hidden
from ivl_jax.model.decoder import Params, hidden_states, logits_from_hidden
from ivl_jax.model.kv_cache import KVCache
from ivl_jax.vocabulary.value_term import ValueTerm


class OwnTokens(NamedTuple):
    """What one value network with its own vocabulary reads in one call."""

    tokens: Int[Array, "B K"]
    """Its own tokens, right-padded with any id."""
    starts: Int[Array, " B"]
    """Position of each row's first token; its cache is discarded from there on."""
    counts: Int[Array, " B"]
    """Real tokens per row, at least 1; the prediction of the last one is composed."""


class Caches(NamedTuple):
    """The keys and values of every network but the draft."""

    base: KVCache
    values: tuple[KVCache, ...]


class HiddenStates(NamedTuple):
    """Final hidden states of every network, for the heads."""

    base: Float[Array, "B T D"]
    values: tuple[Float[Array, "B T2 D2"], ...]
    """One per value network, at the base's positions; for a network that was given `OwnTokens`, at
    its own positions."""
    base_logits: Float[Array, "B T V"] | None = None
    """The base's logits, if a value network had to read them at every position."""
    base_scale: Float32[Array, "B T"] | None = None
    """What the base's logits are multiplied by (in `base_logits` already); None: they are not."""


class NetworkLogits(NamedTuple):
    """Logits of every network at the same positions, padding columns included."""

    base: Float32[Array, "B T V"]
    values: tuple[Float32[Array, "B T V2"], ...]


def run_networks(
    composition: Composition,
    params: ComposedParams,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    caches: Caches | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
    base_hidden: Float[Array, "B T D"] | None = None,
    base_scale: Float32[Array, "B T"] | None = None,
    own_texts: Sequence[OwnTokens | OwnPrefixes] = (),
) -> tuple[HiddenStates, Caches | None]:
    """Run base and value networks over tokens, up to their heads.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        tokens: [B T] token ids of the base.
        positions: [B T] position of each token, and its slot in every cache.
        segment_ids: [B T], 0 is padding; None: one text per row. Not with caches.
        caches: keys and values of what the networks have read; None: no cache.
        prompt_lengths: [B] real tokens of each row, where these are its first; what the caches hold
            is then not read. None: the rows continue.
        base_hidden: the base's final hidden states if already known; the base is then not run, and
            its cache stays as it is.
        base_scale: what the base's logits are multiplied by, for value networks that read them too;
            None: they stay as they are.
        own_texts: what each value network with its own vocabulary reads, in their order: its tokens
            in this call, or (without caches) every prefix of the text.

    Returns:
        The states, and the caches with this call's tokens added (None without caches).
    """
    base = composition.base
    base_cache = None if caches is None else caches.base
    if base_hidden is None:
        base_hidden, base_cache = run_network(
            base,
            params.base,
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=base_cache,
            prompt_lengths=prompt_lengths,
        )
    base_logits = None
    if composition.reads_base_logits:
        base_logits = _scaled(head_logits(base, params.base, base_hidden), base_scale)
    values, value_caches = run_values(
        composition,
        params.values,
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        caches=None if caches is None else caches.values,
        prompt_lengths=prompt_lengths,
        base_hidden=base_hidden,
        base_logits=base_logits,
        own_texts=own_texts,
    )
    hidden = HiddenStates(base_hidden, values, base_logits, base_scale)
    if base_cache is None or value_caches is None:
        return hidden, None
    return hidden, Caches(base_cache, value_caches)


def run_network(
    network: Network,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Run a network that reads only text, a base or its draft, over tokens, up to its head.

    Args:
        network: its static half.
        params: its parameters.
        tokens: [B T] token ids.
        positions: [B T] position of each token, and its slot in the cache.
        segment_ids: [B T], 0 is padding; None: one text per row. Not with a cache.
        cache: what it has read; None: no cache.
        prompt_lengths: as `run_networks` takes it.

    Returns:
        Hidden states [B T D] for its head, and the new cache (None without one).
    """
    return hidden_states(
        network.graphdef,
        params,
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        prompt_lengths=prompt_lengths,
        constrain=network.constrain,
    )


def run_cached(
    network: Network,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """As `run_network`, always with a cache."""
    hidden, after = run_network(
        network, params, tokens, positions=positions, cache=cache, prompt_lengths=prompt_lengths
    )
    assert after is not None
    return hidden, after


def run_values(
    composition: Composition,
    arrays: Sequence[ValueArrays],
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    caches: Sequence[KVCache] | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
    base_hidden: Float[Array, "B T D"] | None = None,
    base_logits: Float[Array, "B T V"] | None = None,
    own_texts: Sequence[OwnTokens | OwnPrefixes] = (),
) -> tuple[tuple[Array, ...], tuple[KVCache, ...] | None]:
    """Run the value networks alone.

    Args:
        composition: the static half.
        arrays: of each value network.
        tokens: [B T] token ids of the base.
        positions: [B T] position of each token.
        segment_ids: [B T], or None.
        caches: of each value network, or None.
        prompt_lengths: as `run_networks` takes it.
        base_hidden: the base's final hidden states; None where no scheme reads them.
        base_logits: the base's logits; None where no scheme reads them.
        own_texts: as `run_networks` takes them.

    Returns:
        Hidden states of each value network, and the new caches (None without caches).
    """
    states, new_caches = [], []
    following = iter(own_texts)
    for index, (network, value) in enumerate(zip(composition.values, arrays, strict=True)):
        own = next(following) if network.mapped else None
        if isinstance(own, OwnPrefixes):
            states.append(run_prefixes(network, value.params, own))
            continue
        lengths = prompt_lengths
        if own is None:
            read, where = known_tokens(network, tokens, value.unknown_ids), positions
        else:
            lengths = None if prompt_lengths is None else own.counts
            steps = jnp.arange(own.tokens.shape[1], dtype=jnp.int32)[None, :]
            read, where = own.tokens, own.starts[:, None] + steps
        scheme = network.connection
        hidden, cache = value_hidden(
            scheme,
            network.graphdef,
            value.params,
            SchemeInputs(
                read,
                base_logits if scheme.reads_base_logits else None,
                base_hidden if scheme.reads_base_hidden else None,
                composition.base.vocab_size,
            ),
            positions=where,
            segment_ids=segment_ids,
            cache=None if caches is None else caches[index],
            prompt_lengths=lengths,
            constrain=network.constrain,
        )
        states.append(hidden)
        if cache is not None:
            new_caches.append(cache)
    return tuple(states), None if caches is None else tuple(new_caches)


def pick(
    composition: Composition,
    hidden: HiddenStates,
    wanted: Int[Array, "B C"],
    own_tokens: Sequence[OwnTokens] = (),
) -> HiddenStates:
    """Pick the hidden states at some positions.

    Args:
        composition: the static half.
        hidden: from `run_networks`.
        wanted: [B C] which of its T positions.
        own_tokens: the `OwnTokens` that `run_networks` was given: for these networks the state of
            each row's last token is picked, and C is 1.

    Returns:
        The states there, [B C D].
    """
    following, values = iter(own_tokens), []
    for network, states in zip(composition.values, hidden.values, strict=True):
        own = next(following, None) if network.mapped else None
        values.append(_pick(states, wanted if own is None else own.counts[:, None] - 1))
    logits = None if hidden.base_logits is None else _pick(hidden.base_logits, wanted)
    return HiddenStates(_pick(hidden.base, wanted), tuple(values), logits)


def network_logits(
    composition: Composition, params: ComposedParams, hidden: HiddenStates
) -> NetworkLogits:
    """Run the heads.

    Args:
        composition: the static half.
        params: the arrays of all networks; only their heads are read.
        hidden: from `run_networks`, all positions or some of them.

    Returns:
        Logits of every network at these positions.
    """
    base = hidden.base_logits
    if base is None:
        base = head_logits(composition.base, params.base, hidden.base)
        base = _scaled(base, hidden.base_scale)
    return NetworkLogits(base, all_value_logits(composition, params.values, hidden.values))


def all_value_logits(
    composition: Composition,
    arrays: Sequence[ValueArrays],
    hidden: Sequence[Array],
) -> tuple[Array, ...]:
    """Run the heads of the value networks alone.

    Args:
        composition: the static half.
        arrays: of each value network.
        hidden: of `run_values`: each value network's final hidden states.

    Returns:
        Logits of each value network.
    """
    each = zip(composition.values, arrays, hidden, strict=True)
    return tuple(head_logits(network, value.params, states) for network, value, states in each)


def compose(
    composition: Composition,
    arrays: Sequence[ValueArrays],
    logits: NetworkLogits,
    *,
    strengths: Float[Array, "#B M"],
    policies: RowPolicies | None = None,
) -> Float32[Array, "B T V"]:
    """Add the value networks' logits to the base's.

    Args:
        composition: the static half.
        arrays: of each value network; only its unknown ids and its map are read.
        logits: from `network_logits`; a draft's logits, in the base's columns, may replace the
            base's.
        strengths: [B M] α of each value network, or one row for all.
        policies: strength policies by name, which say how much of α applies at each position;
            None: all of it.

    Returns:
        Composed logits in float32, −inf in the padding columns.
    """
    size = composition.base.vocab_size

    def at(alphas: Float[Array, "... M"]) -> Float32[Array, "B T V"]:
        each = zip(composition.values, arrays, logits.values, strict=True)
        terms = [
            ValueTerm(
                value_logits,
                alphas[..., index],
                network.vocab_size,
                unknown_ids=None if network.mapped else value.unknown_ids,
                vocabulary_map=value.vocabulary_map,
                centred=network.centred,
            )
            for index, (network, value, value_logits) in enumerate(each)
        ]
        return compose_logits(logits.base, terms, vocab_size=size)

    composed = at(strengths)
    if not policies:
        return composed
    shares = strength_shares(policies, compose_logits(logits.base, (), vocab_size=size), composed)
    return at(strengths[:, None, :] * shares[:, :, None])


def head_logits(
    network: Network, params: Params, hidden: Float[Array, "B T D"]
) -> Float32[Array, "B T V"]:
    """Logits of one network's final hidden states, sharded like its head."""
    if holds_copies(params):
        return logits_of_copies(network, params, hidden)
    logits = logits_from_hidden(network.graphdef, params, hidden)
    constrain = network.constrain
    return logits if constrain is None else constrain(logits, ("batch", "length", "vocabulary"))


def _scaled(
    logits: Float32[Array, "B T V"], scale: Float32[Array, "B T"] | None
) -> Float32[Array, "B T V"]:
    return logits if scale is None else logits * scale[:, :, None]


def _pick(states: Float[Array, "B T D"], wanted: Int[Array, "B C"]) -> Float[Array, "B C D"]:
    return jnp.take_along_axis(states, wanted[:, :, None], axis=1)
