"""New prompts into the free rows of a running batch, as pure functions.

In: a `DecodeState` some of whose rows are done, and prompts. Out: the state with these prompts in
those rows, each with its first generated token; the other rows are as they were.
"""

import jax
from jaxtyping import Array, Int

from ivl_jax.composed.forward import Caches, OwnTokens
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.generate import prefill
from ivl_jax.decoding.device.state import DecodeState, Requests
from ivl_jax.model.kv_cache import KVCache


def admit(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    prompts: Int[Array, "A P"],
    requests: Requests,
    rows: Int[Array, " A"],
    *,
    own_tokens: tuple[OwnTokens, ...] = (),
) -> DecodeState:
    """Read prompts into rows that are free, and generate the first token of each.

    The prompts are read into caches of their own, no longer than they are, which then overwrite the
    beginning of the rows' caches. What a row held beyond is never seen: slot = position, and a
    position is written before it is read.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the other rows are; its stop ids are as wide as those of `requests`.
        prompts: [A P] int32 token ids, right-padded with any id; P ≤ the state's capacity.
        requests: what each of them asks for.
        rows: [A] the row each goes to, no two the same; B, the number of rows: nowhere.
        own_tokens: the prompts as each value network with its own vocabulary reads them.

    Returns:
        The state, these rows one token after their prompts.
    """
    admitted = prefill(
        composition,
        params,
        prompts,
        requests,
        # One slot for the first token; a prompt that fills its row's last slot gets none.
        capacity=prompts.shape[1] + 1,
        own_tokens=own_tokens,
        mapped_capacity=max((own.tokens.shape[1] for own in own_tokens), default=0),
    )
    put = jax.tree.map(lambda old, new: _put(old, new, rows), state, admitted)
    assert isinstance(put, DecodeState)
    return put


def shrink(composition: Composition, state: DecodeState, *, capacity: int) -> DecodeState:
    """Take slots from every row that no row will use.

    Args:
        composition: the static half.
        state: where the rows are.
        capacity: slots a row has afterwards, no more than before and no less than any row's limit
            (tokens). The caches of value networks with their own vocabulary stay as they are.

    Returns:
        The state with smaller caches.
    """

    def cut(cache: KVCache) -> KVCache:
        return jax.tree.map(lambda array: array[:, :, :capacity], cache)

    draft = state.draft
    values = tuple(
        cache if network.mapped else cut(cache)
        for network, cache in zip(composition.values, state.caches.values, strict=True)
    )
    return state._replace(
        tokens=state.tokens[:, :capacity],
        caches=Caches(cut(state.caches.base), values),
        draft=None if draft is None else draft._replace(cache=cut(draft.cache)),
    )


def _put(old: Array, new: Array, rows: Int[Array, " A"]) -> Array:
    """Overwrite the beginning of some rows: [B …] and [B S], or [B K S H] where S may differ."""
    slots = {2: 1, 4: 2}.get(old.ndim)
    if slots is None or old.shape[slots] == new.shape[slots]:
        return old.at[rows].set(new, mode="drop")
    length = min(old.shape[slots], new.shape[slots])
    new = jax.lax.slice_in_dim(new, 0, length, axis=slots)
    index = (rows, *[slice(None)] * (slots - 1), slice(length))
    return old.at[index].set(new, mode="drop")
