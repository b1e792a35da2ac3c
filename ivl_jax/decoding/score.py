"""What a composition says of given continuations, token by token: forced decoding.

In: prepared prompts and the tokens that follow them. Out: the log-probability of each of these
tokens, conditioned on all before it. Value networks with a vocabulary of their own read each prefix
as they would while decoding, so the figure is that of the very distribution tokens are drawn from.
Where all networks share one vocabulary, reading a row at once gives the same in one pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from ivl_jax.decoding.generate import read_tokens
from ivl_jax.decoding.own_vocabulary import TextReader
from ivl_jax.decoding.programs import state_shardings
from ivl_jax.decoding.requests import PromptTooLongError, lay_out
from ivl_jax.decoding.state import (
    ComposedParams,
    Composition,
    DecodeState,
    Network,
    Reading,
    Requests,
)
from ivl_jax.decoding.streaming import FinishReason
from ivl_jax.decoding.text import ComposedModel, EncodedPrompt
from ivl_jax.model.kv_cache import init_cache
from ivl_jax.sharding import batch_ways


class ContinuationScores(NamedTuple):
    """What a composition says of one continuation of n tokens; numpy."""

    log_prob: Float[np.ndarray, " n"]  # log p(token | prompt and those before it), nats
    largest: Bool[np.ndarray, " n"]  # the token has the largest logit, ties included


class _Forced(NamedTuple):
    """One step of forced decoding, [B] each."""

    log_prob: Float32[Array, " B"]
    largest: Bool[Array, " B"]


def score_continuations(
    model: ComposedModel,
    prompts: Sequence[EncodedPrompt],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
) -> Iterator[tuple[int, ContinuationScores]]:
    """Score continuations, longest first.

    Args:
        model: the composition; each prompt's own strengths count, else the model's.
        prompts: from `ComposedModel.prepare`.
        continuations: for each prompt, the base tokens that follow it, at least one.
        batch_size: prompts scored together.

    Yields:
        Index of a prompt and its scores, in the order of computation.

    Raises:
        ValueError: an empty continuation, or ids outside the base's vocabulary.
        PromptTooLongError: prompt and continuation exceed the context; before anything is computed.
    """
    for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        _check(model, index, prompt, continuation)
    order = sorted(range(len(prompts)), key=lambda index: -len(continuations[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        scored = _score_batch(
            model, [prompts[index] for index in chosen], [continuations[index] for index in chosen]
        )
        yield from zip(chosen, scored, strict=True)


def _score_batch(
    model: ComposedModel, prompts: Sequence[EncodedPrompt], continuations: Sequence[Sequence[int]]
) -> list[ContinuationScores]:
    composition, layout = model.composition, model.composition.base.layout
    lengths = np.asarray([len(continuation) for continuation in continuations])
    arrays = lay_out(
        [prompt.token_ids for prompt in prompts],
        [_sized(prompt, len(ids)) for prompt, ids in zip(prompts, continuations, strict=True)],
        rows=[prompt.row for prompt in prompts],
        context=model.context,
        stop_ids=model.stop_ids,
        strengths=model.strengths,
        row_multiple=1 if layout is None else batch_ways(layout.mesh),
    )
    batch, width = arrays.prompts.shape
    targets = np.zeros((batch, int(lengths.max())), np.int32)
    for row, continuation in enumerate(continuations):
        targets[row, : len(continuation)] = continuation
    reader = TextReader(
        [own for own in model.own_vocabularies if own],
        [prompt.own_texts for prompt in prompts],
        batch=batch,
        new_tokens=targets.shape[1],
    )
    fields: dict[str, Any] = {
        "prompt_lengths": arrays.prompt_lengths,
        "limits": arrays.limits,
        "stop_ids": arrays.stop_ids,
        "strengths": arrays.strengths,
        "keys": model.programs.row_keys(arrays.seeds, arrays.rows),
        "sampling": arrays.sampling,
    }
    programs = _build_programs(composition)
    state = programs.begin(
        Requests(**fields), capacity=arrays.capacity, mapped_capacity=reader.capacity
    )
    tokens = arrays.prompts
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    wanted = arrays.prompt_lengths[:, None] - 1
    found = []
    for step in range(targets.shape[1]):
        readings = reader.readings()
        step_scores, state = programs.step(
            model.params, state, tokens, positions, wanted, targets[:, step], readings
        )
        found.append(step_scores)
        # A row that is done reads its last token again, into the slot where it already is.
        at = np.minimum(step, np.concatenate([lengths - 1, np.zeros(batch - len(lengths), int)]))
        tokens = np.take_along_axis(targets, at[:, None], axis=1)
        positions = (arrays.prompt_lengths + at).astype(np.int32)[:, None]
        positions = np.minimum(positions, arrays.capacity - 1)
        wanted = np.zeros_like(tokens)
        room = reader.capacity
        reader.push([ids[step : step + 1] for ids in continuations])
        if reader.capacity > room:
            state = model.programs.grow_mapped(state, mapped_capacity=reader.capacity)
    scores = jax.device_get(found)
    return [
        ContinuationScores(
            np.asarray([step.log_prob[row] for step in scores[:length]]),
            np.asarray([step.largest[row] for step in scores[:length]]),
        )
        for row, length in enumerate(lengths)
    ]


class _Programs(NamedTuple):
    """The compiled programs of forced decoding."""

    begin: Callable[..., DecodeState]
    """(requests, capacity, mapped_capacity) → state with empty caches; capacities are static."""
    step: Callable[..., tuple[_Forced, DecodeState]]
    """(params, state, tokens [B T], positions [B T], wanted [B 1], targets [B], readings) → what is
    said of the targets after the wanted tokens, and the state with their caches; donated."""


@functools.cache
def _build_programs(composition: Composition) -> _Programs:
    shardings = state_shardings(composition)

    def begin(requests: Requests, *, capacity: int, mapped_capacity: int) -> DecodeState:
        batch = requests.prompt_lengths.shape[0]

        def empty_cache(network: Network) -> Any:
            slots = mapped_capacity if network.mapped else capacity
            dtype = jnp.dtype(network.cache_dtype)
            return init_cache(network.arch, batch_size=batch, capacity=slots, dtype=dtype)

        return DecodeState(
            tokens=jnp.zeros((batch, 0), jnp.int32),
            lengths=requests.prompt_lengths,
            finish=jnp.full((batch,), int(FinishReason.RUNNING), jnp.int32),
            requests=requests,
            base_cache=empty_cache(composition.base),
            value_caches=tuple(empty_cache(network) for network in composition.values),
        )

    def step(
        params: ComposedParams,
        state: DecodeState,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        wanted: Int[Array, "B 1"],
        targets: Int[Array, " B"],
        readings: tuple[Reading, ...],
    ) -> tuple[_Forced, DecodeState]:
        logits, state = read_tokens(
            composition,
            params,
            state,
            tokens,
            positions=positions,
            wanted=wanted,
            readings=readings,
        )
        logits = logits[:, 0]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        scores = _Forced(
            chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= jnp.max(logits, axis=-1)
        )
        return scores, state

    return _Programs(
        jax.jit(begin, static_argnames=("capacity", "mapped_capacity"), out_shardings=shardings),
        jax.jit(
            step,
            donate_argnames="state",
            out_shardings=None if shardings is None else (None, shardings),
        ),
    )


def _sized(prompt: EncodedPrompt, new_tokens: int) -> Any:
    return dataclasses.replace(prompt.options, max_new_tokens=new_tokens)


def _check(
    model: ComposedModel, index: int, prompt: EncodedPrompt, continuation: Sequence[int]
) -> None:
    if not continuation:
        raise ValueError(f"continuation {index} has no tokens: give at least one")
    known = model.composition.base.vocab_size
    if strange := [i for i in continuation if not 0 <= i < known]:
        raise ValueError(f"continuation {index}: token ids outside [0, {known}): {strange[:5]}")
    # The last token is only predicted.
    over = len(prompt.token_ids) + len(continuation) - 1 - model.context
    if over > 0:
        raise PromptTooLongError(
            f"continuation {index}: prompt and continuation are {over} tokens more than the "
            f"context of {model.context} tokens (that of {model.context_of}): shorten one"
        )
    own_vocabularies = [own for own in model.own_vocabularies if own]
    for own, text in zip(own_vocabularies, prompt.own_texts, strict=True):
        read = text.fork()
        read.push(continuation[:-1])
        if len(read.tokens) > own.context:
            raise PromptTooLongError(
                f"continuation {index}: prompt and continuation are {len(read.tokens)} tokens of "
                f"{own.name}, in its own vocabulary, more than its context of {own.context}: "
                "shorten one"
            )
