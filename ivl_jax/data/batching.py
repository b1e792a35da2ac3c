"""Makes batches from tokenised dialogues.

In: tokenised dialogues with loss masks. Out: `Batch`es for training (endless, shuffled, resumable)
and for evaluation (one pass).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Int64

from ivl_jax.data.base_states import BaseStates
from ivl_jax.data.formats import Demonstration
from ivl_jax.data.packing import RowPlan, one_per_row, pack
from ivl_jax.data.tokenized import TokenizedDemonstrations

_PREFETCHED = 16  # batches prepared ahead of the step
_PREFETCHED_BYTES = 1 << 30  # fewer if they would be larger than this


class Batch(NamedTuple):
    """Rows of tokens and their targets; NumPy on the host, JAX arrays in a step."""

    tokens: Int32[Array | np.ndarray, "*B T"]  # inputs; padding has the padding id
    targets: Int32[Array | np.ndarray, "*B T"]  # the token that follows in the same segment
    loss_mask: Bool[Array | np.ndarray, "*B T"]  # targets that count: the assistant's
    positions: Int32[Array | np.ndarray, "*B T"]  # from 0 in every segment
    segment_ids: Int32[Array | np.ndarray, "*B T"]  # 1, 2, … along a row; 0 is padding
    # The base's final hidden states, if they are read from disk instead of computed.
    base_states: Float[Array | np.ndarray, "*B T D"] | None = None
    # Of sampled answers: how much better each is than the others to its prompt.
    advantages: Float32[Array | np.ndarray, "*B T"] | None = None
    # Log-probabilities of the targets when they were sampled, if the model has changed since.
    sampled_log_probs: Float32[Array | np.ndarray, "*B T"] | None = None
    # What the base's logits are multiplied by; None: they stay as they are.
    base_scale: Float32[Array | np.ndarray, "*B T"] | None = None

    @property
    def token_mask(self) -> Bool[Array | np.ndarray, "*B T"]:
        """Real tokens, as opposed to padding."""
        return self.segment_ids > 0


class ResumeError(ValueError):
    """A saved position that belongs to other data or another packing."""


def lay_out_rows(
    rows: Sequence[Sequence[tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]]],
    *,
    sequence_length: int,
    pad_id: int,
) -> Batch:
    """Packs dialogues into rows, each dialogue as a separate segment.

    Args:
        rows: For each row, its dialogues: tokens and loss mask. A dialogue of N tokens takes N − 1
            positions, since the last token is only a target.
        sequence_length: Positions per row.
        pad_id: Token id of the padding.

    Returns:
        The batch, `[len(rows), sequence_length]`.

    Example:
        >>> tokens, loss_mask = np.array([1, 7, 8, 2], np.int32), np.array([0, 0, 1, 1], bool)
        >>> batch = lay_out_rows([[(tokens, loss_mask)] * 2], sequence_length=8, pad_id=0)
        >>> batch.tokens
        array([[1, 7, 8, 1, 7, 8, 0, 0]], dtype=int32)
        >>> batch.targets
        array([[7, 8, 2, 7, 8, 2, 0, 0]], dtype=int32)
        >>> batch.loss_mask.astype(int)
        array([[0, 1, 1, 0, 1, 1, 0, 0]])
        >>> batch.positions
        array([[0, 1, 2, 0, 1, 2, 0, 0]], dtype=int32)
        >>> batch.segment_ids
        array([[1, 1, 1, 2, 2, 2, 0, 0]], dtype=int32)
    """
    shape = (len(rows), sequence_length)
    batch = Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        loss_mask=np.zeros(shape, bool),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
    )
    ramp = np.arange(sequence_length, dtype=np.int32)
    for index, dialogues in enumerate(rows):
        start = 0
        for segment, (tokens, loss_mask) in enumerate(dialogues, start=1):
            end = start + len(tokens) - 1
            batch.tokens[index, start:end] = tokens[:-1]
            batch.targets[index, start:end] = tokens[1:]
            batch.loss_mask[index, start:end] = loss_mask[1:]
            batch.positions[index, start:end] = ramp[: end - start]
            batch.segment_ids[index, start:end] = segment
            start = end
    return batch


@dataclass(frozen=True)
class _PackedRows:
    """How this process prepares its rows of a global batch.

    The rows of a global batch are drawn first and then distributed, so a step has the same rows for
    any number of processes.
    """

    tokenized: TokenizedDemonstrations
    plan: RowPlan
    pad_id: int
    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        if self.batch_size % self.process_count or self.process_index >= self.process_count:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of the {self.process_count} "
                f"processes, and process_index = {self.process_index} below their number"
            )

    def batch(self, rows: Sequence[int], states: BaseStates | None = None) -> Batch:
        """This process's rows, filled up with empty ones."""
        length = self.tokenized.sequence_length
        local = self._local(rows)
        segments = [self.tokenized.segments(row) for row in local]
        batch = lay_out_rows(segments, sequence_length=length, pad_id=self.pad_id)
        if states is None:
            return batch
        return batch._replace(base_states=states.lay_out(local, row_length=length))

    def row_ids(self, rows: Sequence[int]) -> list[list[str]]:
        """For each of this process's rows, file and line of its dialogues."""
        return [[self.tokenized.row_id(dialogue) for dialogue in row] for row in self._local(rows)]

    def demonstrations(self, rows: Sequence[int]) -> list[Demonstration]:
        """The demonstrations of this process's rows, in order."""
        tokenized = self.tokenized
        return [
            tokenized.demonstrations[int(tokenized.rows[dialogue])]
            for row in self._local(rows)
            for dialogue in row
        ]

    def prefetched(self, states: Sequence[BaseStates | None]) -> int:
        """How many batches to prefetch; those with states are large."""
        length, rows = self.tokenized.sequence_length, self.batch_size // self.process_count
        largest = max([one.row_bytes(length) for one in states if one is not None], default=0)
        return max(1, min(_PREFETCHED, _PREFETCHED_BYTES // max(rows * largest, 1)))

    def _local(self, rows: Sequence[int]) -> list[list[int]]:
        """The dialogues of this process's rows; none for an empty row."""
        size = self.batch_size // self.process_count
        mine = rows[self.process_index * size : (self.process_index + 1) * size]
        found = [self.plan.row(row).tolist() for row in mine]
        return found + [[] for _ in range(size - len(found))]


class TrainIterator(Iterator[Batch]):
    """Endless shuffled batches; made by `make_train_iterator`.

    Attributes:
        steps_per_epoch: Batches in one pass over the demonstrations.
    """

    def __init__(
        self,
        packed: _PackedRows,
        order: Any,
        *,
        identity: Mapping[str, Any],
        states: Sequence[BaseStates | None],
        turns: Callable[[int], int],
    ):
        self._packed = packed
        self._order = order.repeat()  # by batch number, the rows of a global batch
        self._identity = dict(identity)
        self.steps_per_epoch = len(order)

        def batch(number: int, rows: Sequence[int]) -> Batch:
            return packed.batch(rows, states[turns(number)])

        ahead = packed.prefetched(states)
        self._iterator = iter(
            self._order.map_with_index(batch).to_iter_dataset(
                grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
            )
        )

    def __next__(self) -> Batch:
        return next(self._iterator)

    def __iter__(self) -> "TrainIterator":
        return self

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch taken, ready for `json.dumps`."""
        return {"data": dict(self._identity), "position": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a saved position; the next batch is the one that followed it, bit for bit.

        Args:
            state: The result of `get_state`, in this run or another; the number of processes may
                differ.

        Raises:
            ResumeError: The position was saved with other demonstrations, tokens or packing; names
                each difference.
        """
        saved = state["data"]
        different = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if saved.get(name) != value
        ]
        if different:
            raise ResumeError(
                f"the data position was saved with other data: {'; '.join(different)}; restore the "
                "files and settings of that run, or start a new run"
            )
        self._iterator.set_state(state["position"])

    def row_ids(self, step: int) -> list[list[str]]:
        """Names the demonstrations of a batch.

        Args:
            step: The batch's number, from 0 for the first one of the run.

        Returns:
            For each of this process's rows, file and line of its dialogues; none for an empty row.
        """
        return self._packed.row_ids(self._order[step])

    def demonstrations(self, step: int) -> list[Demonstration]:
        """Returns the demonstrations of a batch, by its number as `row_ids` takes it."""
        return self._packed.demonstrations(self._order[step])


class EvalBatches:
    """One pass in a fixed order, as often as it is iterated; made by `make_eval_batches`."""

    def __init__(self, packed: _PackedRows, order: Any, *, states: BaseStates | None):
        self._packed = packed
        self._order = order
        self._states = states

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._order:
            yield self._packed.batch(rows, self._states)

    def row_ids(self, index: int) -> list[list[str]]:
        """Returns, for each row of batch `index`, file and line of its dialogues."""
        return self._packed.row_ids(self._order[index])

    def demonstrations(self, index: int) -> list[Demonstration]:
        """Returns the demonstrations of batch `index`."""
        return self._packed.demonstrations(self._order[index])


def make_train_iterator(
    tokenized: TokenizedDemonstrations,
    *,
    batch_size: int,
    pad_id: int,
    packing: bool,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    states: Sequence[BaseStates | None] = (None,),
    turns: Callable[[int], int] = lambda batch: 0,
    only: Int64[np.ndarray, "K"] | None = None,
) -> TrainIterator:
    """Makes the batches to train on: every epoch is a new shuffle of all rows.

    Every dialogue is seen exactly once per epoch: the last batch of an epoch is filled up with
    empty rows, which consist of segment 0. The dialogues in a row stay the same over the epochs, so
    that every epoch has the same number of steps; only the rows are shuffled.

    Args:
        tokenized: The dialogues; rows have their `sequence_length`.
        batch_size: Rows of the global batch, over all processes.
        pad_id: Token id of the padding.
        packing: Several dialogues per row, which never attend to each other; otherwise one per row.
        seed: Seed of the order.
        process_index: Index of this process.
        process_count: Number of processes that share the global batch.
        states: For each base, its cached states of these dialogues; None if it runs in every step.
        turns: A batch's number in the run → the base whose states it contains.
        only: Indices of the dialogues that are used; None: all. Not with packing.

    Returns:
        An endless iterator over this process's `[batch_size / process_count, T]` batches.

    Raises:
        ValueError: The processes do not divide the batch.

    Source: shuffling, batching and the position are Grain's. Its packing (`grain.experimental`)
        fills rows on the fly, so that the number of steps is not known before the end of an epoch.
    """
    plan = _plan(tokenized, packing=packing, seed=seed, only=only)
    packed = _PackedRows(tokenized, plan, pad_id, batch_size, process_index, process_count)
    order = grain.MapDataset.range(plan.rows).shuffle(seed=seed % 2**32)
    identity = {
        "demonstrations and tokens": tokenized.fingerprint,
        "batch_size": batch_size,
        "packing": packing,
        "seed": seed,
    }
    if plan.rows < len(tokenized) and not packing:
        identity["dialogues used"] = plan.rows
    batches = order.batch(batch_size, batch_fn=list)
    return TrainIterator(packed, batches, identity=identity, states=states, turns=turns)


def make_eval_batches(
    tokenized: TokenizedDemonstrations,
    *,
    batch_size: int,
    pad_id: int,
    packing: bool,
    max_rows: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    states: BaseStates | None = None,
    only: Int64[np.ndarray, "K"] | None = None,
) -> EvalBatches:
    """Makes the batches to evaluate on: one pass, every row exactly once.

    Args:
        tokenized: The dialogues; rows have their `sequence_length`.
        batch_size: Rows of the global batch; the last one is filled up with empty rows.
        pad_id: Token id of the padding.
        packing: Several dialogues per row, which never attend to each other; otherwise one per row.
        max_rows: If there are more rows, this many are sampled, always the same; 0: all.
        process_index: Index of this process.
        process_count: Number of processes that share the global batch.
        states: The base's cached states of these dialogues; None if it runs.
        only: Indices of the dialogues that are used; None: all. Not with packing.

    Returns:
        Batches of `[batch_size / process_count, T]`, the same number in every process.

    Raises:
        ValueError: The processes do not divide the batch.
    """
    plan = _plan(tokenized, packing=packing, seed=0, only=only)
    packed = _PackedRows(tokenized, plan, pad_id, batch_size, process_index, process_count)
    order = grain.MapDataset.range(plan.rows)
    if 0 < max_rows < plan.rows:
        order = order.shuffle(seed=0)[:max_rows]
    return EvalBatches(packed, order.batch(batch_size, batch_fn=list), states=states)


def _plan(
    tokenized: TokenizedDemonstrations,
    *,
    packing: bool,
    seed: int,
    only: Int64[np.ndarray, "K"] | None,
) -> RowPlan:
    """Which dialogues share a row."""
    if only is not None and packing:
        raise ValueError("a part of the dialogues can only be used without packing")
    if only is not None:
        return one_per_row(len(only))._replace(dialogues=only)
    if not packing:
        return one_per_row(len(tokenized))
    return pack(tokenized.positions, row_length=tokenized.sequence_length, seed=seed)
