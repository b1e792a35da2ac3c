"""The compiled programs of a composition: the one place where decoding is jitted.

In: a `Composition`. Out: `Programs`, with explicit donation and shardings, kept per composition.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.composed.forward import OwnTokens
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.blocks import read_block
from ivl_jax.decoding.device.diagnosis import finite_networks
from ivl_jax.decoding.device.generate import (
    decode_chunk,
    decode_step,
    halt,
    prefill,
    read_base,
)
from ivl_jax.decoding.device.log_probs import empty_log_probs, latest_log_probs
from ivl_jax.decoding.device.placement import empty_cache, empty_rows, place
from ivl_jax.decoding.device.proposals import Proposals, Proposer
from ivl_jax.decoding.device.sampling import row_keys
from ivl_jax.decoding.device.shardings import state_shardings
from ivl_jax.decoding.device.state import DecodeState, LogProbs, Requests
from ivl_jax.decoding.speculative.draft_proposer import DRAFT_PROPOSER
from ivl_jax.decoding.speculative.mapped_rounds import OwnBlock, propose_block, speculate_block
from ivl_jax.decoding.speculative.rounds import speculate_chunk, without_proposals
from ivl_jax.model.kv_cache import KVCache


class Programs(NamedTuple):
    """The compiled programs of a composition; sizes and numbers of tokens kept are static."""

    prefill: Callable[..., DecodeState]
    """(params, prompts [B P], requests, own_tokens, capacity, mapped_capacity, top_log_probs) →
    state whose rows have one generated token."""
    read_block: Callable[..., DecodeState]
    """(params, state, prompts [B P], requests, own_tokens, start, is_last, width) → state, donated,
    whose rows have read one block more of their prompts."""
    decode_chunk: Callable[..., DecodeState]
    """(params, state, max_tokens, stopped [B], enough_done = B) → state; the state's buffers are
    donated."""
    decode_step: Callable[..., DecodeState]
    """(params, state, own_tokens, stopped [B], base_hidden = None) → state with one token more per
    row, donated too."""
    read_base: Callable[..., tuple[DecodeState, Array]]
    """(params, state) → state, donated, and the base's hidden states [B 1 D] for `decode_step`."""
    propose: Callable[..., tuple[DecodeState, Proposals, Array]]
    """(params, state) → state, donated, proposals and how many; for `speculate`."""
    speculate: Callable[..., DecodeState]
    """(params, state, proposals, count, own_block, stopped [B]) → state with up to `count` tokens
    and one more per row, donated too."""
    empty: Callable[..., DecodeState]
    """(rows, capacity, stop_ids, mapped_capacity, top_log_probs) → state whose rows are all
    done."""
    value_caches: Callable[..., tuple[Array, tuple[KVCache | None, ...]]]
    """(strengths [B M], capacity, mapped_capacity, which) → the strengths, and an empty cache for
    each value network in `which`, None for the others: what a batch gets when they join it."""
    place: Callable[..., DecodeState]
    """(state, others of A rows, rows [A]) → state, donated, with these rows there."""
    empty_log_probs: Callable[..., LogProbs]
    """(rows, capacity, top) → room for log-probabilities in a state that has none."""
    latest_log_probs: Callable[..., LogProbs]
    """(log-probabilities, starts [B], width) → those of `width` slots per row."""
    finite_networks: Callable[..., Array]
    """(params, state, own_tokens) → [B N] which networks' next logits are finite."""
    row_keys: Callable[..., Array]
    """(seeds [B], sample indices [B]) → keys [B]."""


# Clients choose which value networks run together: of 16 there are 65,536 sets, each of which would
# keep its compiled programs. What is dropped is compiled again, or read from the compilation cache.
_MOST_COMPOSITIONS = 128


@functools.lru_cache(maxsize=_MOST_COMPOSITIONS)
def build_programs(composition: Composition, proposer: Proposer | None = None) -> Programs:
    """Compile-once entry points of a composition: the one place where decoding is jitted.

    Kept for the compositions used last: other parameters of the same architectures reuse what was
    compiled.

    Args:
        composition: the static half.
        proposer: where proposals come from; None: from the composition's draft, if it has one.

    Returns:
        The jitted programs, with explicit shardings and donation. Each compiles once per shape:
        batch, prompt bucket and capacity.
    """
    if proposer is None and composition.draft is not None:
        proposer = DRAFT_PROPOSER
    shardings = state_shardings(composition, proposer)

    def prefill_program(
        params: ComposedParams,
        prompts: Int[Array, "B P"],
        requests: Requests,
        own_tokens: tuple[OwnTokens, ...] = (),
        *,
        capacity: int,
        mapped_capacity: int = 0,
        top_log_probs: int | None = None,
    ) -> DecodeState:
        return prefill(
            composition,
            params,
            prompts,
            requests,
            own_tokens=own_tokens,
            capacity=capacity,
            mapped_capacity=mapped_capacity,
            top_log_probs=top_log_probs,
            proposer=proposer,
        )

    def block_program(
        params: ComposedParams,
        state: DecodeState,
        prompts: Int[Array, "B P"],
        requests: Requests,
        own_tokens: tuple[OwnTokens, ...],
        start: Int[Array, ""],
        is_last: Bool[Array, ""],
        *,
        width: int,
    ) -> DecodeState:
        return read_block(
            composition,
            params,
            state,
            prompts,
            requests,
            start=start,
            is_last=is_last,
            width=width,
            own_tokens=own_tokens,
            proposer=proposer,
        )

    def chunk_program(
        params: ComposedParams,
        state: DecodeState,
        max_tokens: Int[Array, ""],
        stopped: Bool[Array, " B"],
        enough_done: Int[Array, ""] | None = None,
    ) -> DecodeState:
        decode = functools.partial(decode_chunk, composition, params)
        if proposer is not None:
            decode = functools.partial(speculate_chunk, composition, params, proposer)
        rows = jnp.int32(stopped.shape[0])
        return decode(
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
        base_hidden: Float[Array, "B 1 D"] | None = None,
    ) -> DecodeState:
        state = decode_step(
            composition,
            params,
            halt(state, stopped),
            own_tokens=own_tokens,
            base_hidden=base_hidden,
        )
        return state if proposer is None else without_proposals(state)

    def propose_program(
        params: ComposedParams, state: DecodeState
    ) -> tuple[DecodeState, Proposals, Array]:
        assert proposer is not None
        return propose_block(composition, params, proposer, state)

    def speculate_program(
        params: ComposedParams,
        state: DecodeState,
        proposals: Proposals,
        count: Int[Array, ""],
        own_block: OwnBlock,
        stopped: Bool[Array, " B"],
    ) -> DecodeState:
        assert proposer is not None
        state = halt(state, stopped)
        return speculate_block(composition, params, proposer, state, proposals, count, own_block)

    def empty_program(
        *,
        rows: int,
        capacity: int,
        stop_ids: int,
        mapped_capacity: int = 0,
        top_log_probs: int | None = None,
    ) -> DecodeState:
        return empty_rows(
            composition,
            rows=rows,
            capacity=capacity,
            stop_ids=stop_ids,
            mapped_capacity=mapped_capacity,
            top_log_probs=top_log_probs,
            proposer=proposer,
        )

    def value_caches_program(
        strengths: Float[Array, "B M"],
        *,
        capacity: int,
        mapped_capacity: int,
        which: tuple[int, ...],
    ) -> tuple[Array, tuple[KVCache | None, ...]]:
        rows = strengths.shape[0]
        # Computed, not handed through: it then lies where the other results of programs do.
        return strengths + jnp.float32(0), tuple(
            empty_cache(network, rows, capacity=capacity, mapped_capacity=mapped_capacity)
            if index in which
            else None
            for index, network in enumerate(composition.values)
        )

    def finite_program(
        params: ComposedParams, state: DecodeState, own_tokens: tuple[OwnTokens, ...] = ()
    ) -> Array:
        return finite_networks(composition, params, state, own_tokens=own_tokens)

    return Programs(
        prefill=jax.jit(
            prefill_program,
            static_argnames=("capacity", "mapped_capacity", "top_log_probs"),
            out_shardings=shardings,
        ),
        read_block=jax.jit(
            block_program,
            static_argnames="width",
            donate_argnames="state",
            out_shardings=shardings,
        ),
        decode_chunk=jax.jit(chunk_program, donate_argnames="state", out_shardings=shardings),
        decode_step=jax.jit(step_program, donate_argnames="state", out_shardings=shardings),
        read_base=jax.jit(
            functools.partial(read_base, composition),
            donate_argnames="state",
            out_shardings=None if shardings is None else (shardings, None),
        ),
        propose=jax.jit(
            propose_program,
            donate_argnames="state",
            out_shardings=None if shardings is None else (shardings, None, None),
        ),
        speculate=jax.jit(speculate_program, donate_argnames="state", out_shardings=shardings),
        empty=jax.jit(
            empty_program,
            static_argnames=("rows", "capacity", "stop_ids", "mapped_capacity", "top_log_probs"),
            out_shardings=shardings,
        ),
        value_caches=jax.jit(
            value_caches_program,
            static_argnames=("capacity", "mapped_capacity", "which"),
            out_shardings=None
            if shardings is None
            else (shardings.requests, shardings.caches.values),
        ),
        place=jax.jit(place, donate_argnames="state", out_shardings=shardings),
        empty_log_probs=jax.jit(
            empty_log_probs,
            static_argnums=(0, 1),
            static_argnames="top",
            out_shardings=None if shardings is None else shardings.log_probs,
        ),
        latest_log_probs=jax.jit(latest_log_probs, static_argnames="width"),
        finite_networks=jax.jit(finite_program),
        row_keys=jax.jit(row_keys),
    )
