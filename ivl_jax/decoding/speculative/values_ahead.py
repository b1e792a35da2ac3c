"""Value networks read beyond a row's end: proposals that are not accepted yet.

In: a state, and tokens after each row's last one. Out: the value networks' logits there, and caches
that hold those tokens; a row that does not get them reads other tokens into the same slots later.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ivl_jax.composed.forward import all_value_logits, run_values
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.model.kv_cache import KVCache


def run_values_ahead(
    composition: Composition,
    params: ComposedParams,
    state: DecodeState,
    caches: tuple[KVCache, ...],
    tokens: Int[Array, "B T"],
    index: Int[Array, ""],
) -> tuple[tuple[Array, ...], tuple[KVCache, ...]]:
    """Let the value networks read tokens, from a row's last place or one beyond it on.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        caches: what the value networks have read.
        tokens: [B T] what they read.
        index: places between each row's last one and the first of these.

    Returns:
        Logits [B T Vv] of each value network, and the new caches.
    """
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    hidden, caches_after = run_values(
        composition,
        params.values,
        tokens,
        positions=(state.last_positions + index)[:, None] + steps,
        caches=caches,
    )
    assert caches_after is not None
    return all_value_logits(composition, params.values, hidden), caches_after


def empty_value_logits(
    composition: Composition, params: ComposedParams, state: DecodeState, *, places: int
) -> tuple[Float[Array, "B K Vv"], ...]:
    """Room for every value network's logits at some places of each row.

    Args:
        composition: the static half.
        params: the arrays of all networks.
        state: where the rows are.
        places: K.

    Returns:
        Zeros, one array for each value network.
    """
    run = functools.partial(run_values_ahead, composition)
    token, index = state.lengths[:, None], jnp.int32(0)
    logits, _ = jax.eval_shape(run, params, state, state.caches.values, token, index)
    return tuple(jnp.zeros((each.shape[0], places, each.shape[-1]), jnp.float32) for each in logits)
