"""What callers ask for, checked on the host and laid out as arrays of bucketed shapes.

In: prompts as token ids and one `GenerationOptions` per prompt. Out: NumPy arrays whose shapes come
from a small set, so that prompts of other lengths reuse what was compiled.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ivl_jax.buckets import bucket
from ivl_jax.composed.strength_policies import RowPolicies
from ivl_jax.config import GenerationOptions
from ivl_jax.decoding.device.sampling import Sampling
from ivl_jax.decoding.logit_bias import lay_out_bias
from ivl_jax.decoding.own_vocabulary import OwnText
from ivl_jax.decoding.row_extras import lay_out_policies

# Buckets are 2ᵏ and 3·2ᵏ⁻¹: at most a third of a bucket is padding, and a context of 4,096 has 17.
_SMALLEST_PROMPT = 16
_SMALLEST_CAPACITY = 64
_SMALLEST_STOP_IDS = 8
_SMALLEST_TOP_LOG_PROBS = 8


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the context holds."""


class EncodedPrompt(NamedTuple):
    """A prompt that has passed every check."""

    token_ids: list[int]
    options: GenerationOptions
    sample_index: int
    """Index in the request it belongs to; folded into its sampling seed."""
    own_texts: tuple[OwnText, ...] = ()
    """The prompt as each value network with its own vocabulary reads it."""
    values: tuple[int, ...] | None = None
    """The places in the engine of the value networks that strengths and own texts are of, in this
    order; the prompt uses no others. None: all that there are."""


class RowArrays(NamedTuple):
    """A batch of requests as NumPy arrays; B rows, of which the first ones are real."""

    prompts: np.ndarray
    """[B P] int32, right-padded with 0."""
    prompt_lengths: np.ndarray
    """[B] int32; 1 in rows that only fill the batch."""
    limits: np.ndarray
    """[B] int32, length at which a row ends; 0 in rows that only fill the batch."""
    stop_ids: np.ndarray
    """[B E] int32, filled up with −1."""
    strengths: np.ndarray
    """[B M] float32."""
    seeds: np.ndarray
    """[B] uint32."""
    sample_indices: np.ndarray
    """[B] int32 index of each prompt in its request."""
    sampling: Sampling
    """Four arrays [B], and two [B K] where a row has a logit bias."""
    policies: RowPolicies | None
    """Arrays [B] of each strength policy that a row has."""
    capacity: int
    """Slots a row needs, S (tokens)."""


def lay_out(
    prompts: Sequence[Sequence[int]],
    options: Sequence[GenerationOptions],
    *,
    sample_indices: Sequence[int],
    context: int,
    stop_ids: Sequence[int],
    strengths: Sequence[float],
    row_multiple: int,
    least_rows: int = 1,
    least_stop_ids: int = _SMALLEST_STOP_IDS,
) -> RowArrays:
    """Lay a batch of prompts out in bucketed shapes.

    Args:
        prompts: token ids of each prompt, none empty, none longer than the context.
        options: one per prompt.
        sample_indices: index of each prompt in the request it belongs to.
        context: tokens a row may hold, prompt included.
        stop_ids: ids that end every row.
        strengths: α of each value network, for options that name none.
        row_multiple: the number of rows is made a multiple of this (for a mesh).
        least_rows: no fewer rows than this.
        least_stop_ids: room for stop ids in a row, at least; a bucket.

    Returns:
        The arrays.
    """
    filled = len(prompts)
    # The caller's number is kept if it suffices: 9 rows over 3 devices are not a bucket.
    batch = least_rows if filled <= least_rows else bucket(filled, smallest=1)
    batch = -(-batch // row_multiple) * row_multiple
    each = [*options, *[GenerationOptions()] * (batch - filled)]

    def column(values: Sequence[Any], dtype: type, *, fill: int = 0) -> np.ndarray:
        return np.asarray([*values, *[fill] * (batch - len(values))], dtype)

    def asked(name: str, dtype: type) -> Any:
        return column([getattr(option, name) for option in each], dtype)

    lengths = column([len(prompt) for prompt in prompts], np.int32, fill=1)
    ends = [
        row_end(prompt, option, context=context)
        for prompt, option in zip(prompts, options, strict=True)
    ]
    width = prompt_width(int(lengths.max()), context=context)
    tokens = np.zeros((batch, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    row_stops = [_row_stops(option, stop_ids) for option in each]
    most = bucket(max(map(len, row_stops)), smallest=least_stop_ids)
    alphas = [strengths if option.strengths is None else option.strengths for option in each]
    return RowArrays(
        prompts=tokens,
        prompt_lengths=lengths,
        limits=column(ends, np.int32),
        stop_ids=np.asarray([(*own, *[-1] * (most - len(own))) for own in row_stops], np.int32),
        strengths=np.asarray(alphas, np.float32).reshape(batch, len(strengths)),
        seeds=asked("seed", np.uint32),
        sample_indices=column(sample_indices, np.int32),
        sampling=Sampling(
            temperature=asked("temperature", np.float32),
            top_k=asked("top_k", np.int32),
            top_p=asked("top_p", np.float32),
            min_p=asked("min_p", np.float32),
            bias=lay_out_bias(each, rows=batch),
        ),
        policies=lay_out_policies(each, rows=batch),
        capacity=bucket_capacity(max(*ends, width), context=context),
    )


def row_end(prompt: Sequence[int], option: GenerationOptions, *, context: int) -> int:
    """The length, prompt included, at which a row ends (tokens)."""
    return min(len(prompt) + option.max_new_tokens, context)


def needed_slots(prompt: Sequence[int], option: GenerationOptions, *, context: int) -> int:
    """Slots that a row needs: for its tokens, and for its prompt with padding."""
    end = row_end(prompt, option, context=context)
    return max(end, prompt_width(len(prompt), context=context))


def bucket_capacity(length: int, *, context: int) -> int:
    """Slots of rows that hold `length` tokens, of a context of `context`."""
    return bucket(length, smallest=_SMALLEST_CAPACITY, largest=context)


def bucket_stop_ids(option: GenerationOptions, stop_ids: Sequence[int]) -> int:
    """Room for stop ids that a row with these options needs, besides the ids that end every row."""
    return bucket(len(_row_stops(option, stop_ids)), smallest=_SMALLEST_STOP_IDS)


def bucket_top_log_probs(options: Iterable[GenerationOptions], *, vocab_size: int) -> int | None:
    """Likeliest tokens to keep per generated token; None: no log-probabilities are asked for."""
    asked = [option.log_probs for option in options if option.log_probs is not None]
    if not any(asked):
        return 0 if asked else None
    most = min(max(asked), vocab_size)
    return bucket(most, smallest=_SMALLEST_TOP_LOG_PROBS, largest=vocab_size)


def prompt_width(length: int, *, context: int) -> int:
    """Tokens of a prompt with padding."""
    return bucket(length, smallest=_SMALLEST_PROMPT, largest=context)


def _row_stops(option: GenerationOptions, stop_ids: Sequence[int]) -> tuple[int, ...]:
    """A row's stop ids: everybody's, then its own."""
    return tuple(dict.fromkeys((*stop_ids, *option.stop_ids)))
