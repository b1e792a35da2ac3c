"""Rows come, go and move: batches without requests, and rows put into another batch in place.

In: two `DecodeState`s. Out: one of them with rows of the other, which keep what they have read. So
prompts that were read by themselves join a running batch, and a batch becomes larger or smaller.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ivl_jax.composed.forward import Caches
from ivl_jax.composed.network import Composition, Network
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.log_probs import empty_log_probs
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.sampling import Sampling, row_keys
from ivl_jax.decoding.device.state import DecodeState, Requests, SpeculationState
from ivl_jax.model.kv_cache import KVCache, init_cache


def empty_rows(
    composition: Composition,
    *,
    rows: int,
    capacity: int,
    stop_ids: int,
    mapped_capacity: int = 0,
    top_log_probs: int | None = None,
    proposer: Proposer | None = None,
) -> DecodeState:
    """Make rows that only pad a batch.

    Args:
        composition: the static half.
        rows: how many, B.
        capacity: slots per row, S (tokens).
        stop_ids: room for stop ids per row, E.
        mapped_capacity: slots per row in the caches of value networks with their own vocabulary.
        top_log_probs: likeliest tokens kept per generated token, K; None: no log-probabilities.
        proposer: where proposals come from; None: one token per step.

    Returns:
        A state all of whose rows are done.
    """

    def cache(network: Network) -> KVCache:
        return empty_cache(network, rows, capacity=capacity, mapped_capacity=mapped_capacity)

    integers, floats = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32)
    speculation = None
    if proposer is not None:
        own = proposer.empty(composition, rows, capacity)
        speculation = SpeculationState(own, integers, integers, floats, floats)
    return DecodeState(
        tokens=jnp.zeros((rows, capacity), jnp.int32),
        lengths=integers,
        finish=jnp.full(rows, int(FinishReason.LENGTH), jnp.int32),
        requests=Requests(
            prompt_lengths=jnp.ones(rows, jnp.int32),
            limits=integers,
            stop_ids=jnp.full((rows, stop_ids), -1, jnp.int32),
            strengths=jnp.zeros((rows, len(composition.values)), jnp.float32),
            keys=row_keys(integers, integers),
            sampling=Sampling(floats, integers, floats + 1.0, floats),
        ),
        caches=Caches(
            cache(composition.base),
            tuple(cache(network) for network in composition.values),
        ),
        speculation=speculation,
        log_probs=None
        if top_log_probs is None
        else empty_log_probs(rows, capacity, top=top_log_probs),
    )


def empty_cache(network: Network, rows: int, *, capacity: int, mapped_capacity: int) -> KVCache:
    """Make the cache of one network, in which nothing has been read.

    Args:
        network: the network.
        rows: how many, B.
        capacity: slots per row where it reads the base's tokens.
        mapped_capacity: slots per row where it has its own vocabulary.

    Returns:
        Zeros.
    """
    return init_cache(
        network.arch,
        batch_size=rows,
        capacity=mapped_capacity if network.mapped else capacity,
        dtype=jnp.dtype(network.cache_dtype),
        rings=not network.mapped,  # re-tokenised text may return to any earlier position
    )


def place(state: DecodeState, others: DecodeState, rows: Int[Array, " A"]) -> DecodeState:
    """Put rows of one batch into another, in place of what was there.

    They may differ in their number of slots: slots beyond the smaller one are cut off, or left as
    they were. Those are never seen: such a row fits the smaller one, where slot = position (a ring
    is as long in every batch that needs more), and a position is written before it is read. But
    attention weighs unseen slots by 0, and 0 · NaN is NaN: floats that the previous row left there
    become 0.

    Args:
        state: the batch that receives them, of the same kinds of parts as the other one; its stop
            ids are at least as wide, and where they are wider, these rows' were −1.
        others: A rows.
        rows: [A] the row each goes to, no two the same; B, the number of rows: nowhere.

    Returns:
        The first batch with these rows.
    """
    put = jax.tree.map(lambda old, new: _put(old, new, rows), state, others)
    assert isinstance(put, DecodeState)
    return put


def _put(old: Array, new: Array, rows: Int[Array, " A"]) -> Array:
    """Overwrite some rows: [B …], [B S], [B S K] or [B K S H]; S may differ."""
    slots = {2: 1, 3: 1, 4: 2}.get(old.ndim)
    if slots is None or old.shape[slots] == new.shape[slots]:
        return old.at[rows].set(new, mode="drop")
    length = min(old.shape[slots], new.shape[slots])
    new = jax.lax.slice_in_dim(new, 0, length, axis=slots)
    before = (rows, *[slice(None)] * (slots - 1))
    if jnp.issubdtype(old.dtype, jnp.floating):
        old = old.at[(*before, slice(length, None))].set(jnp.zeros((), old.dtype), mode="drop")
    return old.at[(*before, slice(length))].set(new, mode="drop")
