"""The compiled programs of a composition: the one place where decoding is jitted.

In: a `Composition`. Out: `Programs`, kept for each composition, with donation and shardings said.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from ivl_jax.composed.forward import Caches, OwnTokens
from ivl_jax.composed.network import ComposedParams, Composition, Network
from ivl_jax.decoding.device.admission import admit, shrink
from ivl_jax.decoding.device.generate import decode_chunk, decode_step, grow_mapped, halt, prefill
from ivl_jax.decoding.device.sampling import row_keys
from ivl_jax.decoding.device.state import DecodeState, DraftState, Requests
from ivl_jax.decoding.speculative.rounds import speculate_chunk
from ivl_jax.sharding import BATCH_AXES, replicated


class Programs(NamedTuple):
    """The compiled programs of a composition."""

    prefill: Callable[..., DecodeState]
    """(params, prompts [B P], requests, own_tokens, capacity, mapped_capacity) → state whose rows
    have one generated token; the capacities are static."""
    decode_chunk: Callable[..., DecodeState]
    """(params, state, max_tokens, stopped [B], enough_done = B) → state; the state's buffers are
    donated."""
    decode_step: Callable[..., DecodeState]
    """(params, state, own_tokens, stopped [B]) → state with one token more a row, donated too."""
    grow_mapped: Callable[..., DecodeState]
    """(state, mapped_capacity) → state with more slots for own tokens; the number is static."""
    admit: Callable[..., DecodeState]
    """(params, state, prompts [A P], requests, rows [A], own_tokens) → state with these prompts in
    these rows, donated too."""
    shrink: Callable[..., DecodeState]
    """(state, capacity) → state with fewer slots a row; the number is static."""
    row_keys: Callable[..., Array]
    """(seeds [B], rows [B]) → keys [B]."""


@functools.cache
def build_programs(composition: Composition) -> Programs:
    """Compile-once entry points of a composition: the one place where decoding is jitted.

    Kept for each composition: other parameters of the same architectures reuse what was compiled.

    Args:
        composition: the static half.

    Returns:
        The programs under jit, shardings and donation said. Each compiles once a shape: batch,
        prompt bucket and capacity.
    """
    shardings = _state_shardings(composition)

    def prefill_program(
        params: ComposedParams,
        prompts: Int[Array, "B P"],
        requests: Requests,
        own_tokens: tuple[OwnTokens, ...] = (),
        *,
        capacity: int,
        mapped_capacity: int = 0,
    ) -> DecodeState:
        return prefill(
            composition,
            params,
            prompts,
            requests,
            own_tokens=own_tokens,
            capacity=capacity,
            mapped_capacity=mapped_capacity,
        )

    def chunk_program(
        params: ComposedParams,
        state: DecodeState,
        max_tokens: Int[Array, ""],
        stopped: Bool[Array, " B"],
        enough_done: Int[Array, ""] | None = None,
    ) -> DecodeState:
        rows = jnp.int32(stopped.shape[0])
        decode = decode_chunk if composition.draft is None else speculate_chunk
        return decode(
            composition,
            params,
            state,
            max_tokens=max_tokens,
            stopped=stopped,
            enough_done=rows if enough_done is None else enough_done,
        )

    def step_program(
        params: ComposedParams,
        state: DecodeState,
        own_tokens: tuple[OwnTokens, ...],
        stopped: Bool[Array, " B"],
    ) -> DecodeState:
        return decode_step(composition, params, halt(state, stopped), own_tokens=own_tokens)

    def grow_program(state: DecodeState, *, mapped_capacity: int) -> DecodeState:
        return grow_mapped(composition, state, mapped_capacity=mapped_capacity)

    def admit_program(
        params: ComposedParams,
        state: DecodeState,
        prompts: Int[Array, "A P"],
        requests: Requests,
        rows: Int[Array, " A"],
        own_tokens: tuple[OwnTokens, ...] = (),
    ) -> DecodeState:
        return admit(composition, params, state, prompts, requests, rows, own_tokens=own_tokens)

    def shrink_program(state: DecodeState, *, capacity: int) -> DecodeState:
        return shrink(composition, state, capacity=capacity)

    return Programs(
        prefill=jax.jit(
            prefill_program,
            static_argnames=("capacity", "mapped_capacity"),
            out_shardings=shardings,
        ),
        decode_chunk=jax.jit(chunk_program, donate_argnames="state", out_shardings=shardings),
        decode_step=jax.jit(step_program, donate_argnames="state", out_shardings=shardings),
        grow_mapped=jax.jit(
            grow_program, static_argnames="mapped_capacity", out_shardings=shardings
        ),
        admit=jax.jit(admit_program, donate_argnames="state", out_shardings=shardings),
        shrink=jax.jit(shrink_program, static_argnames="capacity", out_shardings=shardings),
        row_keys=jax.jit(row_keys),
    )


def _state_shardings(composition: Composition) -> DecodeState | None:
    """Caches: rows over data × fsdp, kv heads as the network's layout says. The rest: whole."""
    if composition.base.layout is None:
        return None
    whole = replicated(composition.base.layout.mesh)
    shardings: dict[str, Any] = dict.fromkeys(DecodeState._fields, whole)
    values: Any = tuple(map(_cache_sharding, composition.values))
    base: Any = _cache_sharding(composition.base)
    shardings["caches"] = Caches(base, values)
    shardings["draft"] = None
    if composition.draft is not None:
        of_draft: dict[str, Any] = dict.fromkeys(DraftState._fields, whole)
        of_draft["cache"] = _cache_sharding(composition.draft)
        shardings["draft"] = DraftState(**of_draft)
    return DecodeState(**shardings)


def _cache_sharding(network: Network) -> NamedSharding:
    layout = network.layout
    assert layout is not None
    axis = layout.rules.kv_heads
    if axis and network.arch.num_key_value_heads % layout.mesh.shape[axis]:
        axis = None
    return NamedSharding(layout.mesh, PartitionSpec(BATCH_AXES, axis, None, None))
