"""The rows on device, and which request each of them continues.

In: requests that are to begin. Out: after each look of the host at the device, what every row has
generated since. One batch owns one `DecodeState`; nothing else may hold it, since every step
donates it.

Only value networks that a row uses run, and only they have caches. A network joins the batch with
the first request that uses it: its cache is then empty in all other rows, whose strength for it is
0 to their end, so that they never need what it would have read. It leaves with the last such row.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ivl_jax.buckets import bucket
from ivl_jax.decoding.begun_step import BegunStep
from ivl_jax.decoding.capacity import BatchShape, Need
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.engine_model import ModelParts, Places, union
from ivl_jax.decoding.entries import Entry, News, requests_of, token_log_probs
from ivl_jax.decoding.generation import TokenLogProbs
from ivl_jax.decoding.own_vocabulary import TextReader
from ivl_jax.decoding.requests import (
    RowArrays,
    bucket_top_log_probs,
    lay_out,
    row_end,
)
from ivl_jax.decoding.row_errors import row_error
from ivl_jax.decoding.row_extras import with_extras, without_extras
from ivl_jax.decoding.value_caches import with_values

# New tokens whose log-probabilities are fetched at once: few widths, few programs.
_SMALLEST_FETCH = 16


@dataclass
class _Row:
    """A request that is being continued."""

    entry: Entry
    end: int  # length at which it ends
    seen: int  # tokens that the host has looked at, prompt included


class RowBatch:
    """Rows on device.

    Args:
        parts: the model, under any set of its value networks.
        shape: how many rows there are, and of how many slots.
        context: tokens that a row may hold, at most those of the model.

    Attributes:
        shape: As it is now.
    """

    def __init__(self, parts: ModelParts, shape: BatchShape, *, context: int) -> None:
        self._parts, self._context = parts, context
        self._model = parts.part(shape.values)
        self.shape = shape
        self._rows: list[_Row | None] = [None] * shape.rows
        self._reader = TextReader(self._model.own_vocabularies, batch=shape.rows)
        self._held: DecodeState | None = None
        self._begun = BegunStep()

    @property
    def free(self) -> list[int]:
        """Rows that continue nothing."""
        return [place for place, row in enumerate(self._rows) if row is None]

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing on device yet."""
        return self._held is None

    @property
    def is_intact(self) -> bool:
        """Whether it holds a state that no failed program has taken."""
        return self._held is not None and not any(
            leaf.is_deleted() for leaf in jax.tree.leaves(self._held)
        )

    def needs(self) -> list[Need]:
        """What the running requests still need."""
        read = self._reader.slots()
        return [
            row.entry.need._replace(
                slots=row.end, mapped_slots=max(row.entry.need.mapped_slots, read)
            )
            for row in self._rows
            if row is not None
        ]

    def used(self) -> Places:
        """The value networks that a running request uses."""
        return union(row.entry.need.values for row in self._rows if row is not None)

    def start(self, entries: Sequence[Entry]) -> None:
        """Begin requests where nothing runs, all prompts at once.

        Args:
            entries: at most as many as there are rows.
        """
        self._held = None  # its memory goes to the new state
        self._begun.forget()
        self._use(union(entry.need.values for entry in entries))
        model, rows = self._model, range(len(entries))
        arrays = self._take(entries, rows, values=self.shape.values, least_rows=self.shape.rows)
        prefilled = model.programs.prefill(
            model.params,
            arrays.prompts,
            requests_of(arrays, self._model.programs),
            self._reader.own_tokens(rows, size=self.shape.rows),
            capacity=self.shape.capacity,
            mapped_capacity=self.shape.mapped_capacity,
            top_log_probs=self._top_log_probs(),
        )
        self._held = without_extras(prefilled)

    def admit(self, entries: Sequence[Entry], *, group: int) -> None:
        """Begin requests in free rows, while the others stay where they are.

        Args:
            entries: at most `group`, and no more than rows are free. Only the value networks that
                they use read the prompts.
            group: prompts that are read together; missing ones are filled up, so that one program
                serves all groups of prompts of a bucket.
        """
        rows, values = self.free[: len(entries)], union(entry.need.values for entry in entries)
        self._use(union([self.used(), values]))
        part = self._parts.part(values)
        arrays = self._take(entries, rows, values=values, least_rows=group)
        size, width = arrays.prompts.shape
        read = zip(self._mapped(), self._reader.own_tokens(rows, size=size), strict=True)
        own_tokens = tuple(own for place, own in read if place in values)
        top_log_probs = self._top_log_probs()
        admitted = part.programs.prefill(
            part.params,
            arrays.prompts,
            requests_of(arrays, self._model.programs),
            own_tokens,
            # One slot for the first token; a prompt that fills its row's last slot gets none.
            capacity=width + 1,
            mapped_capacity=max((own.tokens.shape[1] for own in own_tokens), default=0),
            top_log_probs=top_log_probs,
        )
        if values != self.shape.values:
            most = max((own.tokens.shape[1] for own in own_tokens), default=1)
            each = [*entries, *[None] * (size - len(entries))]
            admitted = self._with_values(admitted, each, values, self.shape.values, most)
        places = np.full(size, self.shape.rows, np.int32)  # beyond the batch: not placed
        places[: len(rows)] = rows
        self._keep_log_probs(top_log_probs)
        self._begun.forget()
        self._held = self._model.programs.place(self._state, without_extras(admitted), places)

    def advance(self, max_tokens: int, *, enough_free: int) -> None:
        """Generate until there is something to look at.

        Args:
            max_tokens: tokens per row, at most; 1 in any case where a value network has its own
                vocabulary: the host reads for it.
            enough_free: rows that are free when it ends early.
        """
        model, read = self._model, self._reader.slots()
        if read > self.shape.mapped_capacity:  # a text has more tokens than was expected
            self.reshape(self.shape._replace(mapped_capacity=read))
        stopped = np.asarray([row is None for row in self._rows])
        self._keep_log_probs(self._top_log_probs())
        state = with_extras(self._state, [row and row.entry.prompt.options for row in self._rows])
        if model.own_vocabularies:
            slots = self.shape.mapped_capacity
            state = self._begun.finish(model, state, self._reader, stopped, mapped_capacity=slots)
        else:
            most, enough = np.int32(max_tokens), np.int32(enough_free)
            state = model.programs.decode_chunk(model.params, state, most, stopped, enough)
        self._held = without_extras(state)

    def look(self, *, advances_next: bool = False) -> list[News]:
        """Take what the rows have generated since the last look.

        A row belongs to its request until it is released.

        Args:
            advances_next: whether `advance` probably comes next: where the host has to read for
                value networks, the base's part of that step is then begun before.
        """
        state = self._state
        tokens, lengths, finish = jax.device_get((state.tokens, state.lengths, state.finish))
        proposed = accepted = np.zeros_like(lengths)
        if state.speculation is not None:
            speculation = state.speculation
            proposed, accepted = jax.device_get((speculation.proposed, speculation.accepted))
        live = [(place, row) for place, row in enumerate(self._rows) if row is not None]
        new_ids = {place: tokens[place, row.seen : lengths[place]].tolist() for place, row in live}
        log_probs = self._fetch_log_probs(new_ids)
        failed = [place for place, _ in live if finish[place] == FinishReason.ERROR]
        errors = self._blame(failed) if failed else {}
        if (
            advances_next
            and self._model.own_vocabularies
            and (finish == FinishReason.RUNNING).any()
        ):
            self._held = self._begun.begin(self._model, self._state)
        full = self._reader.push(new_ids)
        news = []
        for place, row in live:
            row.seen = int(lengths[place])
            reason = FinishReason(int(finish[place]))
            # A value network that can read no more ends the row by its length.
            ended = place in full and reason == FinishReason.RUNNING
            news.append(
                News(
                    row.entry.id,
                    new_ids[place],
                    FinishReason.LENGTH if ended else reason,
                    log_probs.get(place, []),
                    int(proposed[place]),
                    int(accepted[place]),
                    errors.get(place),
                )
            )
        return news

    def release(self, request: int) -> None:
        """Free the row of a request that has ended or been cancelled."""
        for place, row in enumerate(self._rows):
            if row is not None and row.entry.id == request:
                self._rows[place] = None
                self._reader.release(place)

    def reshape(self, shape: BatchShape) -> None:
        """Move the running rows into a batch of another shape, or of other value networks.

        Args:
            shape: has room for all of them, and the value networks that they use.
        """
        # What leaves makes room before anything grows.
        self._use(tuple(place for place in self.shape.values if place in shape.values))
        self._resize(shape._replace(values=self.shape.values))
        self._use(shape.values)

    def _use(self, values: Places) -> None:
        """Run these value networks from now on."""
        if values == self.shape.values:
            return
        self._begun.forget()
        if self._held is not None:
            entries = [None if row is None else row.entry for row in self._rows]
            capacity, before = self.shape.mapped_capacity, self.shape.values
            self._held = self._with_values(self._held, entries, before, values, capacity)
        self.shape, self._model = self.shape._replace(values=values), self._parts.part(values)
        self._reader.use(self._model.own_vocabularies)

    def _with_values(
        self,
        state: DecodeState,
        entries: Sequence[Entry | None],
        before: Places,
        after: Places,
        mapped_capacity: int,
    ) -> DecodeState:
        """A state of these rows under other value networks than before."""
        strengths = np.zeros((len(entries), len(after)), np.float32)
        for row, entry in enumerate(entries):
            if entry is not None:
                strengths[row] = entry.used.of(after)
        return with_values(
            self._parts.part(after).programs,
            state,
            strengths,
            kept=[before.index(place) if place in before else None for place in after],
            mapped_capacity=mapped_capacity,
        )

    def _mapped(self) -> list[int]:
        """The value networks of the batch that have their own vocabulary."""
        return [place for place in self.shape.values if self._parts.own_vocabulary(place)]

    def _resize(self, shape: BatchShape) -> None:
        if shape == self.shape:
            return
        self._begun.forget()
        live = [place for place, row in enumerate(self._rows) if row is not None]
        # Rows stay where they are unless the last ones go.
        targets = live if shape.rows >= self.shape.rows else list(range(len(live)))
        moved: list[int | None] = [None] * shape.rows
        for target, place in zip(targets, live, strict=True):
            moved[target] = place
        if live:
            places = np.full(self.shape.rows, shape.rows, np.int32)
            places[live] = targets
            empty = self._model.programs.empty(
                **shape.sizes, top_log_probs=self._state.top_log_probs
            )
            self._held = self._model.programs.place(empty, self._state, places)
        else:
            self._held = None
        self._rows = [None if place is None else self._rows[place] for place in moved]
        self._reader.rearrange(moved)
        self.shape = shape

    @property
    def _state(self) -> DecodeState:
        if self._held is None:
            empty = self._model.programs.empty
            self._held = empty(**self.shape.sizes, top_log_probs=self._top_log_probs())
        return self._held

    def _take(
        self, entries: Sequence[Entry], rows: Sequence[int], *, values: Places, least_rows: int
    ) -> RowArrays:
        """Give requests these rows; return their arrays, for these value networks."""
        model, prompts, mapped = self._model, [entry.prompt for entry in entries], self._mapped()
        for place, entry in zip(rows, entries, strict=True):
            length = len(entry.prompt.token_ids)
            end = row_end(entry.prompt.token_ids, entry.prompt.options, context=self._context)
            self._rows[place] = _Row(entry, end, seen=length)
            self._reader.admit(place, [entry.used.texts.get(value) for value in mapped])
        return lay_out(
            [prompt.token_ids for prompt in prompts],
            [
                dataclasses.replace(entry.prompt.options, strengths=entry.used.of(values))
                for entry in entries
            ],
            sample_indices=[prompt.sample_index for prompt in prompts],
            context=self._context,
            stop_ids=model.stop_ids,
            strengths=(0.0,) * len(values),
            row_multiple=model.row_multiple,
            least_rows=least_rows,
            least_stop_ids=self.shape.stop_ids,
        )

    def _top_log_probs(self) -> int | None:
        """Likeliest tokens to keep for the running requests; None: none asks for any."""
        size = self._model.composition.base.vocab_size
        asked = [
            bucket_top_log_probs(row.entry.prompt.options, vocab_size=size)
            for row in self._rows
            if row is not None
        ]
        return max((top for top in asked if top is not None), default=None)

    def _keep_log_probs(self, top: int | None) -> None:
        """Allocate or drop their arrays in the state; what they held has been fetched."""
        state = self._state
        if state.top_log_probs != top:
            room = None
            if top is not None:
                make = self._model.programs.empty_log_probs
                room = make(self.shape.rows, self.shape.capacity, top=top)
            self._held = state._replace(log_probs=room)

    def _fetch_log_probs(self, new_ids: dict[int, list[int]]) -> dict[int, list[TokenLogProbs]]:
        """Log-probabilities of new tokens, by row, of the rows that ask for them."""
        held, asking = self._state.log_probs, dict[int, int]()
        starts = np.zeros(self.shape.rows, np.int32)
        for place, row in enumerate(self._rows):
            if row is not None and row.entry.prompt.options.log_probs is not None:
                asking[place], starts[place] = row.entry.prompt.options.log_probs, row.seen
        longest = max((len(new_ids[place]) for place in asking), default=0)
        if held is None or not longest:
            return {}
        width = bucket(longest, smallest=_SMALLEST_FETCH)
        fetch = self._model.programs.latest_log_probs
        latest = jax.device_get(fetch(held, starts, width=width))
        return {
            place: [token_log_probs(latest, place, i, top=top) for i in range(len(new_ids[place]))]
            for place, top in asking.items()
        }

    def _blame(self, failed: Sequence[int]) -> dict[int, str]:
        """Name the networks whose logits were not finite, by row."""
        model = self._model
        rows = range(self.shape.rows)
        # All of their tokens have been read by now: this reads each row's last one again.
        own_tokens = self._reader.own_tokens(rows, size=len(rows))
        finite = jax.device_get(
            model.programs.finite_networks(model.params, self._state, own_tokens)
        )
        errors = {}
        for place in failed:
            row, flags = self._rows[place], finite[place].tolist()
            assert row is not None
            for index, value in enumerate(self.shape.values, start=1):
                # A network that the row does not use has read something else there.
                flags[index] |= value not in row.entry.used.strengths
            errors[place] = row_error(model, flags)
        return errors
