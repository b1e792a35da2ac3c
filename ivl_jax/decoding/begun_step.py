"""What the device does of a step while the host re-tokenises for it.

In: rows on device, under value networks of which one has its own vocabulary. Out: the rows one step
further. The base's part of a step, and what a proposer proposes, need nothing of the host: they are
begun as soon as the tokens before are known.
"""

from collections.abc import Sequence

import jax
import numpy as np

from ivl_jax.config import GenerationOptions
from ivl_jax.decoding.device.proposals import Proposals
from ivl_jax.decoding.device.state import DecodeState
from ivl_jax.decoding.engine_model import EngineModel
from ivl_jax.decoding.own_vocabulary import TextReader
from ivl_jax.decoding.row_extras import with_extras, without_extras
from ivl_jax.decoding.speculative.draft_length import block_width


class BegunStep:
    """A step of a batch that has perhaps begun."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: rows have moved or joined since."""
        # The base's hidden states at each row's last token.
        self._base_hidden: jax.Array | None = None
        # What may follow the rows, and how many tokens of it are meant.
        self._proposed: tuple[Proposals, jax.Array] | None = None

    def begin(
        self,
        model: EngineModel,
        state: DecodeState,
        options: Sequence[GenerationOptions | None],
    ) -> DecodeState:
        """Begin the next step.

        Args:
            model: what the rows have in common.
            state: the rows; donated.
            options: of each row; None: it continues nothing. A draft proposes by them.

        Returns:
            The same rows.
        """
        if model.proposer is None and model.composition.draft is None:
            state, self._base_hidden = model.programs.read_base(model.params, state)
            return state
        asking = with_extras(state, options)
        asking, proposals, count = model.programs.propose(model.params, asking)
        self._proposed = proposals, count
        return without_extras(asking)

    def finish(
        self,
        model: EngineModel,
        state: DecodeState,
        reader: TextReader,
        stopped: np.ndarray,
        *,
        mapped_capacity: int,
    ) -> DecodeState:
        """Take the step, whether it has begun or not.

        Args:
            model: what the rows have in common.
            state: the rows; donated.
            reader: what the value networks with their own vocabularies read; it knows all tokens.
            stopped: [B] bool, rows that the host has ended.
            mapped_capacity: slots per row in these networks' caches.

        Returns:
            The rows with one token more, or several where proposals were accepted.
        """
        base_hidden, proposed = self._base_hidden, self._proposed
        self.forget()
        if proposed is not None:
            proposals, count = proposed
            tokens, counts, most = jax.device_get((proposals.tokens, proposals.counts, count))
            counts = np.where(stopped, 0, np.minimum(counts, most)).tolist()
            if any(counts):
                fixed = model.composition.draft_length
                width = fixed + 1 if fixed else block_width(int(most))
                own = reader.own_block(tokens, counts, width=width, slots=mapped_capacity)
                return model.programs.speculate(model.params, state, proposals, count, own, stopped)
        own_tokens = reader.own_tokens(range(len(stopped)), size=len(stopped))
        return model.programs.decode_step(model.params, state, own_tokens, stopped, base_hidden)
