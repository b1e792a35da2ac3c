"""Prompts through the rows of one batch: where a row ends, the next waiting prompt begins.

In: prepared prompts, in the order in which they begin. Out: after each look of the host at the
device, what every row has said since.

A row's tokens depend neither on the others nor on when it begins: they are those of its prompt
alone, near-ties apart, samples included (a row's key comes from its prompt's index). This holds on
a mesh and with value networks of their own vocabularies too.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from ivl_jax.buckets import bucket
from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.decoding.device.programs import Programs
from ivl_jax.decoding.device.state import DecodeState, Requests
from ivl_jax.decoding.own_vocabulary import OwnVocabulary, TextReader
from ivl_jax.decoding.requests import (
    EncodedPrompt,
    RowArrays,
    bucket_capacity,
    bucket_stop_ids,
    lay_out,
    needed_slots,
    row_end,
)
from ivl_jax.decoding.streaming import FinishReason, RowText
from ivl_jax.profiling import StepProfile
from ivl_jax.sharding import batch_ways

# Rows that end before prompts are admitted, as a share of the batch. Reading the weights for one
# prompt costs about a step; letting k rows wait for k prompts costs, at L tokens a row and B rows,
# (k − 1) L / 2B² steps a prompt. At L = 128 the best k is B / 8.
_ROWS_A_REFILL = 8


class Decoder(NamedTuple):
    """What all rows of a model have in common."""

    composition: Composition
    params: ComposedParams
    programs: Programs
    own_vocabularies: tuple[OwnVocabulary, ...]
    """The text side of each value network that has its own vocabulary."""
    context: int
    """Tokens a row may hold."""
    stop_ids: tuple[int, ...]
    """Ids that end every row."""
    strengths: tuple[float, ...]
    """α of each value network, where a prompt names none."""


class Progress(NamedTuple):
    """What one row has said since the last look."""

    index: int
    """The prompt it goes on from."""
    piece: str
    """Text that has become final, perhaps none."""
    text: RowText
    """All that the row has said; its `finish` says whether that was the last."""
    judged: int = 0
    """Tokens that a draft has proposed for it, up to each first one that was not kept."""
    accepted: int = 0
    """Those that were kept."""


def decode_rows(
    decoder: Decoder,
    prompts: Sequence[EncodedPrompt],
    *,
    new_text: Callable[[EncodedPrompt], RowText],
    batch_size: int,
    chunk_tokens: int,
    profile: StepProfile,
) -> Iterator[list[Progress]]:
    """Decode prompts in as many rows as there are, refilled as they end.

    Args:
        decoder: the model.
        prompts: in the order in which they begin.
        new_text: makes the text of a prompt's continuation, empty so far.
        batch_size: prompts decoded together.
        chunk_tokens: tokens between two looks, at most; 1 in any case where a value network has its
            own vocabulary: the host reads for it.
        profile: traces some steps, each from one look to the next.

    Yields:
        After each look, one entry a row that was decoded; the last one of a prompt has a text that
        is finished.
    """
    if not prompts:
        return
    batch = _Batch(decoder, prompts, new_text=new_text, batch_size=batch_size)
    yield batch.look()
    for step in itertools.count():
        if batch.done:
            return
        with profile.step(step, None):
            # The host reads a first token before the next one is decoded: value networks with
            # their own vocabulary read what it says.
            if not batch.refill():
                batch.advance(chunk_tokens)
            progress = batch.look()
        yield progress


@dataclass
class _Row:
    """A prompt that is being continued."""

    index: int
    text: RowText
    seen: int  # tokens that the host has looked at, prompt included
    end: int  # length at which it ends


class _Batch:
    """The rows on device, which prompt each of them continues, and the prompts that wait."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[EncodedPrompt],
        *,
        new_text: Callable[[EncodedPrompt], RowText],
        batch_size: int,
    ) -> None:
        """Begin as many prompts as there are rows."""
        self._decoder, self._prompts, self._new_text = decoder, prompts, new_text
        context, layout = decoder.context, decoder.composition.base.layout
        self._ways = 1 if layout is None else batch_ways(layout.mesh)
        batch = bucket(min(batch_size, len(prompts)), smallest=1)
        batch = -(-batch // self._ways) * self._ways
        self._rows: list[_Row | None] = [None] * batch
        self._at_once = max(1, batch // _ROWS_A_REFILL)
        self._stop_ids = bucket_stop_ids([each.options for each in prompts], decoder.stop_ids)
        slots = [needed_slots(each.token_ids, each.options, context=context) for each in prompts]
        # Of each prompt, the slots that it or a later one needs: caches never grow, so that a
        # batch that fits the memory at its beginning fits it to its end.
        self._needed = [*itertools.accumulate(reversed(slots), max)][::-1]
        self._capacity = bucket_capacity(self._needed[0], context=context)
        self._reader = TextReader(decoder.own_vocabularies, batch=batch)
        for each, needed in zip(prompts, slots, strict=True):
            more = needed - len(each.token_ids)
            self._reader.reserve(each.own_texts, new_tokens=more)
        self._begun = 0
        rows = range(min(batch, len(prompts)))
        arrays = self._begin(rows, least_rows=batch)
        self._mapped_capacity = self._reader.capacity
        self._state: DecodeState = decoder.programs.prefill(
            decoder.params,
            arrays.prompts,
            self._requests(arrays),
            self._reader.own_tokens(rows, size=batch),
            capacity=self._capacity,
            mapped_capacity=self._mapped_capacity,
        )

    @property
    def done(self) -> bool:
        """Whether every prompt has been continued to its end."""
        return self._waiting == 0 and not any(self._rows)

    @property
    def _waiting(self) -> int:
        return len(self._prompts) - self._begun

    def look(self) -> list[Progress]:
        """Take what the rows have generated since the last look; rows that ended are free."""
        state = self._state
        tokens, lengths, finish = jax.device_get((state.tokens, state.lengths, state.finish))
        judged = accepted = np.zeros_like(lengths)
        if state.draft is not None:
            judged, accepted = jax.device_get((state.draft.judged, state.draft.accepted))
        new_ids = {
            place: tokens[place, row.seen : lengths[place]].tolist()
            for place, row in enumerate(self._rows)
            if row is not None
        }
        full = self._reader.push(new_ids)
        progress = []
        for place, ids in new_ids.items():
            row = self._rows[place]
            assert row is not None
            piece = row.text.push(ids, _finish(int(finish[place]), full=place in full))
            row.seen = int(lengths[place])
            counts = int(judged[place]), int(accepted[place])
            progress.append(Progress(row.index, piece, row.text, *counts))
            if row.text.finish != FinishReason.RUNNING:
                self._rows[place] = None
        return progress

    def refill(self) -> bool:
        """Begin waiting prompts in free rows, if enough of these are free; was any begun?"""
        begun = self._begun
        self._shrink()  # first, so that fewer capacities are compiled for
        free = [place for place, row in enumerate(self._rows) if row is None]
        while self._waiting and len(free) >= self._enough_free:
            count = self._enough_free
            self._admit(free[:count])
            free = free[count:]
        return self._begun > begun

    def advance(self, chunk_tokens: int) -> None:
        """Generate until there is something to look at."""
        decoder = self._decoder
        free = np.asarray([row is None for row in self._rows])
        if not decoder.own_vocabularies:
            self._state = decoder.programs.decode_chunk(
                decoder.params,
                self._state,
                np.int32(chunk_tokens),
                free,
                np.int32(self._enough_free),
            )
            return
        self._grow_mapped()
        own_tokens = self._reader.own_tokens(range(len(free)), size=len(free))
        self._state = decoder.programs.decode_step(decoder.params, self._state, own_tokens, free)

    @property
    def _enough_free(self) -> int:
        """Free rows that are worth a refill; all of them, where no prompt waits."""
        return min(self._at_once, self._waiting) or len(self._rows)

    def _admit(self, places: Sequence[int]) -> None:
        """Begin the next prompts in these rows."""
        decoder = self._decoder
        arrays = self._begin(places, least_rows=self._at_once)
        size = len(arrays.prompts)
        rows = np.full(size, len(self._rows), np.int32)  # beyond the batch: nowhere
        rows[: len(places)] = places
        own_tokens = self._reader.own_tokens(places, size=size)
        self._grow_mapped()
        self._state = decoder.programs.admit(
            decoder.params, self._state, arrays.prompts, self._requests(arrays), rows, own_tokens
        )

    def _begin(self, places: Sequence[int], *, least_rows: int) -> RowArrays:
        """Give the next prompts these rows; return their arrays."""
        decoder = self._decoder
        first, self._begun = self._begun, self._begun + len(places)
        group = self._prompts[first : self._begun]
        for index, place in enumerate(places, first):
            prompt = self._prompts[index]
            end = row_end(prompt.token_ids, prompt.options, context=decoder.context)
            text = self._new_text(prompt)
            self._rows[place] = _Row(index, text, seen=len(prompt.token_ids), end=end)
            self._reader.admit(place, prompt.own_texts)
        return lay_out(
            [prompt.token_ids for prompt in group],
            [prompt.options for prompt in group],
            rows=[prompt.row for prompt in group],
            context=decoder.context,
            stop_ids=decoder.stop_ids,
            strengths=decoder.strengths,
            row_multiple=self._ways,
            least_rows=least_rows,
            least_stop_ids=self._stop_ids,
        )

    def _requests(self, arrays: RowArrays) -> Requests:
        # NumPy arrays: each becomes a device array as the program is called.
        return Requests(
            prompt_lengths=arrays.prompt_lengths,  # pyright: ignore[reportArgumentType]
            limits=arrays.limits,  # pyright: ignore[reportArgumentType]
            stop_ids=arrays.stop_ids,  # pyright: ignore[reportArgumentType]
            strengths=arrays.strengths,  # pyright: ignore[reportArgumentType]
            keys=self._decoder.programs.row_keys(arrays.seeds, arrays.rows),
            sampling=arrays.sampling,
        )

    def _shrink(self) -> None:
        """Give up half of the slots, or more, once no prompt needs them."""
        needed = [row.end for row in self._rows if row is not None]
        needed += self._needed[self._begun : self._begun + 1]
        capacity = bucket_capacity(max(needed, default=1), context=self._decoder.context)
        if 2 * capacity <= self._capacity:
            self._capacity = capacity
            self._state = self._decoder.programs.shrink(self._state, capacity=capacity)

    def _grow_mapped(self) -> None:
        """Give the value networks with their own vocabulary the slots that they need by now."""
        if self._reader.capacity > self._mapped_capacity:
            self._mapped_capacity = self._reader.capacity
            self._state = self._decoder.programs.grow_mapped(
                self._state, mapped_capacity=self._mapped_capacity
            )


def _finish(code: int, *, full: bool) -> FinishReason:
    """Why a row ends; one whose value network can read no more ends by its length."""
    reason = FinishReason(code)
    return FinishReason.LENGTH if full and reason == FinishReason.RUNNING else reason
