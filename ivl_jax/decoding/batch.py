"""The rows on device, and which request each of them continues.

In: requests that are to begin. Out: after each look of the host at the device, what every row has
generated since. One batch owns one `DecodeState`; nothing else may hold it, since every step
donates it.

Only value networks that a row uses run, and only they have caches. A network joins the batch with
the first request that uses it: its cache is then empty in all other rows, whose strength for it is
0 to their end, so that they never need what it would have read. It leaves with the last such row.
"""

from collections.abc import Sequence

import jax
import numpy as np

from ivl_jax.config import GenerationOptions
from ivl_jax.decoding.begun_step import BegunStep
from ivl_jax.decoding.capacity import BatchShape, Fits, Need
from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.engine_model import ModelParts, Places, union
from ivl_jax.decoding.entries import Entry, News, Row, requests_of
from ivl_jax.decoding.own_vocabulary import TextReader
from ivl_jax.decoding.prompt_blocks import BlockReading, lay_out_entries
from ivl_jax.decoding.requests import RowArrays, row_end
from ivl_jax.decoding.row_errors import row_errors
from ivl_jax.decoding.row_extras import with_extras, without_extras
from ivl_jax.decoding.row_log_probs import fetch_log_probs, top_to_keep, with_room
from ivl_jax.decoding.value_caches import with_values


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
        self._rows: list[Row | None] = [None] * shape.rows
        self._reader = TextReader(self._model.own_vocabularies, batch=shape.rows)
        self._held: DecodeState | None = None
        self._begun = BegunStep()
        # A prompt that is read apart, block by block; it takes a row after the last one.
        self._reading: BlockReading | None = None

    @property
    def free(self) -> list[int]:
        """Rows that continue nothing."""
        return [place for place, row in enumerate(self._rows) if row is None]

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing on device yet."""
        return self._held is None

    @property
    def reads(self) -> int | None:
        """The request whose prompt is being read block by block; None: there is none."""
        return None if self._reading is None else self._reading.entry.id

    @property
    def is_intact(self) -> bool:
        """Whether it holds a state that no failed program has taken."""
        return self._held is not None and not any(
            leaf.is_deleted() for leaf in jax.tree.leaves(self._held)
        )

    def needs(self) -> list[Need]:
        """What the running requests still need."""
        read = self._reader.slots()
        needs = [
            row.entry.need._replace(
                slots=row.end, mapped_slots=max(row.entry.need.mapped_slots, read)
            )
            for row in self._rows
            if row is not None
        ]
        return needs if self._reading is None else [*needs, self._reading.entry.need]

    def used(self) -> Places:
        """The value networks that a running request uses."""
        return union(entry.need.values for entry in self._entries())

    def start(self, entries: Sequence[Entry]) -> None:
        """Begin requests where nothing runs, all prompts at once.

        Args:
            entries: at most as many as there are rows.
        """
        self._held = None  # its memory goes to the new state
        self._begun.forget()
        self._use(union(entry.need.values for entry in entries))
        model, rows = self._model, range(len(entries))
        self._occupy(rows, entries)
        arrays = self._arrays(entries, self.shape.values, least_rows=self.shape.rows)
        prefilled = model.programs.prefill(
            model.params,
            arrays.prompts,
            requests_of(arrays, model.programs),
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
        self._occupy(rows, entries)
        arrays = self._arrays(entries, values, least_rows=group)
        size, width = arrays.prompts.shape
        read = zip(self._mapped(), self._reader.own_tokens(rows, size=size), strict=True)
        own_tokens = tuple(own for place, own in read if place in values)
        top_log_probs = self._top_log_probs()
        admitted = part.programs.prefill(
            part.params,
            arrays.prompts,
            requests_of(arrays, part.programs),
            own_tokens,
            # One slot for the first token; a prompt that fills its row's last slot gets none.
            capacity=width + 1,
            mapped_capacity=max((own.tokens.shape[1] for own in own_tokens), default=0),
            top_log_probs=top_log_probs,
        )
        most = max((own.tokens.shape[1] for own in own_tokens), default=1)
        self._join(entries, rows, admitted, values, mapped_capacity=most)

    def begin_blocks(self, entry: Entry, *, block: int) -> None:
        """Begin a request whose prompt is read block by block; none of it is read yet.

        Args:
            entry: the request; no other one is being read.
            block: tokens of a block, at most.
        """
        assert self._reading is None
        context, stop_ids = self._context, self.shape.stop_ids
        self._reading = BlockReading(
            self._parts, entry, block=block, context=context, stop_ids=stop_ids
        )

    def read_block(self) -> None:
        """Read the next block; after the last one the request takes a free row."""
        reading = self._reading
        assert reading is not None
        if not reading.read(top_log_probs=self._top_log_probs()):
            return
        entries, values, rows = [reading.entry], reading.entry.need.values, self.free[:1]
        self._use(self.used())
        self._reading, capacity = None, reading.mapped_capacity
        self._occupy(rows, entries, is_read=True)
        self._join(entries, rows, reading.state, values, mapped_capacity=capacity)

    def _join(
        self,
        entries: Sequence[Entry],
        rows: Sequence[int],
        admitted: DecodeState,
        values: Places,
        *,
        mapped_capacity: int,
    ) -> None:
        """Put rows that have been read under these value networks into these rows of the batch."""
        size = len(admitted.lengths)
        if values != self.shape.values:
            admitted = with_values(
                self._parts,
                admitted,
                [*entries, *[None] * (size - len(entries))],
                before=values,
                after=self.shape.values,
                mapped_capacity=mapped_capacity,
            )
        places = np.full(size, self.shape.rows, np.int32)  # beyond the batch: not placed
        places[: len(rows)] = rows
        self._keep_log_probs(admitted.top_log_probs)
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
        state = with_extras(self._state, self._options())
        if model.own_vocabularies:
            slots = self.shape.mapped_capacity
            state = self._begun.finish(model, state, self._reader, stopped, mapped_capacity=slots)
        else:
            most, enough = np.int32(max_tokens), np.int32(enough_free)
            state = model.programs.decode_chunk(model.params, state, most, stopped, enough)
        self._held = without_extras(state)

    def look(self, fits: Fits, *, advances_next: bool = False) -> list[News]:
        """Take what the rows have generated since the last look.

        A row belongs to its request until it is released.

        Args:
            fits: a row ends that needs caches of a size that does not.
            advances_next: whether `advance` probably comes next: where the host has to read for
                value networks, the base's part of that step is then begun before.
        """
        live = [(place, row) for place, row in enumerate(self._rows) if row is not None]
        if not live:
            return []
        state = self._state
        tokens, lengths, finish = jax.device_get((state.tokens, state.lengths, state.finish))
        proposed = accepted = np.zeros_like(lengths)
        if state.speculation is not None:
            speculation = state.speculation
            proposed, accepted = jax.device_get((speculation.proposed, speculation.accepted))
        new_ids = {place: tokens[place, row.seen : lengths[place]].tolist() for place, row in live}
        entries = {place: row.entry for place, row in live}
        log_probs = fetch_log_probs(self._model, state, new_ids, lengths, entries)
        failed = [place for place, _ in live if finish[place] == FinishReason.ERROR]
        errors = self._blame(failed) if failed else {}
        if (
            advances_next
            and self._model.own_vocabularies
            and (finish == FinishReason.RUNNING).any()
        ):
            self._held = self._begun.begin(self._model, self._state, self._options())
        full = self._reader.push(new_ids)
        grown = self.shape._replace(mapped_capacity=self._reader.slots())
        if grown.mapped_capacity > self.shape.mapped_capacity and not fits(grown):
            full = self._reader.end_beyond(self.shape.mapped_capacity)
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
        if self.reads == request:
            self._reading = None
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
            self._held = with_values(
                self._parts,
                self._held,
                entries,
                before=self.shape.values,
                after=values,
                mapped_capacity=self.shape.mapped_capacity,
            )
        self.shape, self._model = self.shape._replace(values=values), self._parts.part(values)
        self._reader.use(self._model.own_vocabularies)

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

    def _occupy(
        self, rows: Sequence[int], entries: Sequence[Entry], *, is_read: bool = False
    ) -> None:
        """Give requests these rows."""
        mapped = self._mapped()
        for place, entry in zip(rows, entries, strict=True):
            length = len(entry.prompt.token_ids)
            end = row_end(entry.prompt.token_ids, entry.prompt.options, context=self._context)
            self._rows[place] = Row(entry, end, seen=length)
            texts = [entry.used.texts.get(value) for value in mapped]
            self._reader.admit(place, texts, is_read=is_read)

    def _arrays(self, entries: Sequence[Entry], values: Places, *, least_rows: int) -> RowArrays:
        return lay_out_entries(
            self._parts,
            entries,
            values,
            context=self._context,
            least_rows=least_rows,
            least_stop_ids=self.shape.stop_ids,
        )

    def _entries(self) -> list[Entry]:
        """All requests that it has."""
        entries = [row.entry for row in self._rows if row is not None]
        return entries if self._reading is None else [*entries, self._reading.entry]

    def _options(self) -> list[GenerationOptions | None]:
        """What each row asks for; None: it is free."""
        return [row and row.entry.prompt.options for row in self._rows]

    def _top_log_probs(self) -> int | None:
        """Likeliest tokens to keep for the running requests; None: none asks for any."""
        return top_to_keep(self._model, self._entries())

    def _keep_log_probs(self, top: int | None) -> None:
        """Allocate or drop their arrays in the state; what they held has been fetched."""
        self._held = with_room(self._model, self._state, top)

    def _blame(self, failed: Sequence[int]) -> dict[int, str]:
        """Name the networks whose logits were not finite, by row."""
        model, rows = self._model, range(self.shape.rows)
        # All of their tokens have been read by now: this reads each row's last one again.
        own_tokens = self._reader.own_tokens(rows, size=len(rows))
        finite = jax.device_get(
            model.programs.finite_networks(model.params, self._state, own_tokens)
        )
        used = {place: row.entry.used for place in failed if (row := self._rows[place])}
        return row_errors(model, self.shape.values, used, finite)
