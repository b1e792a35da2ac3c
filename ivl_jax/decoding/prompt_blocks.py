"""Prompts on their way into a batch: their arrays, and a long one that is read block by block.

In: requests that are to begin. Out: rows apart from those of the batch, which goes on generating
between two blocks.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ivl_jax.decoding.device.generate import widest_block
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.engine_model import ModelParts, Places
from ivl_jax.decoding.entries import Entry, requests_of
from ivl_jax.decoding.own_vocabulary import TextReader
from ivl_jax.decoding.requests import RowArrays, lay_out
from ivl_jax.decoding.row_extras import without_extras
from ivl_jax.decoding.row_log_probs import with_room


def lay_out_entries(
    parts: ModelParts,
    entries: Sequence[Entry],
    values: Places,
    *,
    context: int,
    least_rows: int,
    least_stop_ids: int,
) -> RowArrays:
    """Lay requests out as arrays.

    Args:
        parts: the model.
        entries: the requests.
        values: the value networks whose strengths the rows have.
        context: tokens that a row may hold.
        least_rows: no fewer rows than this.
        least_stop_ids: room for stop ids in a row, at least; a bucket.

    Returns:
        The arrays.
    """
    prompts = [entry.prompt for entry in entries]
    return lay_out(
        [prompt.token_ids for prompt in prompts],
        [
            dataclasses.replace(entry.prompt.options, strengths=entry.used.of(values))
            for entry in entries
        ],
        sample_indices=[prompt.sample_index for prompt in prompts],
        context=context,
        stop_ids=parts.stop_ids,
        strengths=(0.0,) * len(values),
        row_multiple=parts.row_multiple,
        least_rows=least_rows,
        least_stop_ids=least_stop_ids,
    )


class BlockReading:
    """A prompt that is read block by block by the value networks that it uses, and by no others.

    Args:
        parts: the model.
        entry: the request.
        block: tokens of a block, at most; fewer where a network has a ring for its window.
        context: tokens that a row may hold.
        stop_ids: room for stop ids in a row of the batch.

    Attributes:
        entry: As given.
        state: Its row, and rows that only fill the mesh; with its first token after the last block.
        mapped_capacity: Slots of the row in caches of value networks with their own vocabulary.
    """

    def __init__(
        self, parts: ModelParts, entry: Entry, *, block: int, context: int, stop_ids: int
    ) -> None:
        values = entry.need.values
        self.entry, self._model = entry, parts.part(values)
        self._width = widest_block(self._model.composition, block)
        self._arrays = lay_out_entries(
            parts, [entry], values, context=context, least_rows=1, least_stop_ids=stop_ids
        )
        self._requests = requests_of(self._arrays, self._model.programs)
        self._reader = TextReader(self._model.own_vocabularies, batch=1)
        self._reader.admit(0, [entry.used.texts[v] for v in values if parts.own_vocabulary(v)])
        self.mapped_capacity = self._reader.slots()
        self._left = -(-entry.longest_text // self._width)
        self._start = 0
        rows, columns = self._arrays.prompts.shape
        self.state: DecodeState = self._model.programs.empty(
            rows=rows,
            # One slot for the first token; a prompt that fills its row's last slot gets none.
            capacity=columns + 1,
            stop_ids=self._arrays.stop_ids.shape[1],
            mapped_capacity=self.mapped_capacity,
        )

    def read(self, *, top_log_probs: int | None) -> bool:
        """Read the next block.

        Args:
            top_log_probs: likeliest tokens to keep of the first token, which follows the last
                block; None: no log-probabilities.

        Returns:
            Whether it was the last one.
        """
        model, arrays, self._left = self._model, self._arrays, self._left - 1
        is_last = not self._left
        if is_last:
            self.state = with_room(model, self.state, top_log_probs)
        own_tokens = self._reader.own_tokens([0], size=len(arrays.prompts), at_most=self._width)
        state = model.programs.read_block(
            model.params,
            self.state,
            arrays.prompts,
            self._requests,
            own_tokens,
            np.int32(self._start),
            np.bool_(is_last),
            width=self._width,
        )
        self.state = without_extras(state)
        self._start += self._width
        return is_last
