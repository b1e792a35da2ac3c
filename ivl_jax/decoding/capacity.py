"""How large a batch is: rows and slots for the requests that run and wait, within given limits.

In: `EngineLimits`, and what each request needs. Out: a `BatchShape`, and how many of the waiting
requests fit it. Plain arithmetic on the host; the same requests give the same shapes.

A batch is as large as the requests that are known need: those that all wait from the beginning get
one batch that never grows, while requests that come later make it grow. It shrinks when half of
its slots or three quarters of its rows are unused, and ends when no request is left.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ivl_jax.buckets import bucket
from ivl_jax.config import SMALLEST_PREFILL_BLOCK
from ivl_jax.decoding.prompt_groups import usual_group
from ivl_jax.decoding.requests import bucket_capacity

# Rows shrink once there are this many times as many as needed: each number of rows compiles.
_ROWS_TO_SPARE = 4
# A group of short prompts is counted in rows of as many slots: no ring is as short.
_SHORT_ROW = 64


class RequestTooLargeError(ValueError):
    """A request cannot fit an engine's limits, however little else is decoded."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may take.

    A batch of `least_rows` = `max_rows` rows of `least_capacity` = `max_capacity` slots has one
    shape: nothing is compiled after the first requests of each length. Where caches grow or shrink,
    the old ones and the new ones exist together for a moment, and prompts that join running rows
    are read in rows of their own: `max_cache_bytes` holds for all of these together.

    Attributes:
        max_rows: Requests decoded together, at most; rounded up to a bucket.
        max_capacity: Tokens that a request may hold, its prompt included; None: the context.
        max_cache_bytes: Bytes of caches that each device may hold at any moment; None: as many as
            rows and slots take. A request that needs more than the others leave room for waits its
            turn.
        least_rows: Rows that a batch has at least, where the bytes allow it.
        least_capacity: Slots that they have at least, likewise.
        prefill_block: Tokens of prompts that are read between two steps of running rows, at most;
            longer prompts are read in blocks of as many. None: every prompt is read at once.
    """

    max_rows: int = 8
    max_capacity: int | None = None
    max_cache_bytes: int | None = None
    least_rows: int = 1
    least_capacity: int = 1
    prefill_block: int | None = None

    def __post_init__(self) -> None:
        """Check ranges; all problems are named at once."""
        names = ("max_rows", "max_capacity", "max_cache_bytes", "least_rows", "least_capacity")
        given = {name: getattr(self, name) for name in names}
        problems = [
            f"{name} must be ≥ 1, got {value}"
            for name, value in given.items()
            if value is not None and value < 1
        ]
        block, smallest = self.prefill_block, SMALLEST_PREFILL_BLOCK
        if block is not None and block < smallest:
            problems.append(f"prefill_block must be ≥ {smallest}, got {block}")
        if self.least_rows > self.max_rows:
            problems.append(
                f"least_rows must be ≤ max_rows, got {self.least_rows} > {self.max_rows}"
            )
        if self.max_capacity is not None and self.least_capacity > self.max_capacity:
            problems.append(
                "least_capacity must be ≤ max_capacity, got "
                f"{self.least_capacity} > {self.max_capacity}"
            )
        if problems:
            raise ValueError("engine limits: " + "; ".join(problems))


class Need(NamedTuple):
    """What one request needs of the batch it is decoded in."""

    slots: int
    """Tokens of its row, those of the prompt with padding."""
    mapped_slots: int = 0
    """Slots in the caches of value networks with their own vocabulary, as far as is known."""
    stop_ids: int = 1
    """Room for its stop ids."""
    values: tuple[int, ...] = ()
    """The value networks that it uses, by place: they are in its batch."""
    in_blocks: bool = False
    """Whether its prompt is read block by block, in a row beside the batch."""


class BatchShape(NamedTuple):
    """The static sizes of a batch: each of them, together, compiles its own programs."""

    rows: int
    capacity: int
    """Slots per row (tokens)."""
    mapped_capacity: int
    """Slots per row in the caches of value networks with their own vocabulary."""
    stop_ids: int
    """Room for stop ids per row."""
    values: tuple[int, ...] = ()
    """The value networks that run in it, by place; the others have no caches."""

    @property
    def sizes(self) -> dict[str, int]:
        """All but the value networks: what programs of these take."""
        return {name: size for name, size in self._asdict().items() if name != "values"}


Fits = Callable[[BatchShape], bool]
"""Whether the caches of a batch may take as much as those of this one."""


class Plan(NamedTuple):
    """What to decode next."""

    shape: BatchShape
    """The shape of the batch."""
    admitted: int
    """How many waiting requests fit in addition to those that run, from the first one on."""


class Waiting:
    """The needs of the waiting requests, counted: their largest is known at once."""

    def __init__(self) -> None:
        self._counts: Counter[Need] = Counter()

    def add(self, need: Need) -> None:
        """Add the need of one more waiting request."""
        self._counts[need] += 1

    def remove(self, need: Need) -> None:
        """Remove the need of a request that no longer waits."""
        self._counts[need] -= 1
        if not self._counts[need]:
            del self._counts[need]

    def __len__(self) -> int:
        return self._counts.total()

    def kinds(self) -> Iterable[Need]:
        """The distinct needs."""
        return self._counts.keys()


@dataclass(frozen=True)
class CapacityPlanner:
    """Chooses shapes within limits.

    Attributes:
        limits: What the caller allows.
        context: Tokens that the networks can read.
        row_multiple: The number of rows is a multiple of this (for a mesh).
        cache_bytes: Bytes of caches that each device holds in a batch of this shape.
    """

    limits: EngineLimits
    context: int
    row_multiple: int
    cache_bytes: Callable[[BatchShape], int]

    @property
    def longest(self) -> int:
        """Tokens that a request may hold, its prompt included."""
        return min(self.context, self.limits.max_capacity or self.context)

    @property
    def most_rows(self) -> int:
        """Requests decoded together, at most."""
        return self._rows(self.limits.max_rows)

    def check(self, need: Need, *, tokens: int) -> None:
        """Refuse a request that can never be decoded.

        Args:
            need: what it needs.
            tokens: tokens it may hold, its prompt included.

        Raises:
            RequestTooLargeError: alone it exceeds the limits.
        """
        if tokens > self.longest:
            raise RequestTooLargeError(
                f"the request may hold {tokens} tokens, its prompt included: "
                f"{tokens - self.longest} more than the engine's max_capacity of {self.longest}; "
                "shorten the prompt, ask for fewer new tokens (max_new_tokens), or give the engine "
                "a larger max_capacity"
            )
        alone = self._smallest(1, [need])
        if not self.fits(alone, beside=need.in_blocks):
            taken = self._peak(alone, beside=need.in_blocks)
            raise RequestTooLargeError(
                f"the request may hold {tokens} tokens, whose caches alone take "
                f"{taken:,} bytes on each device, more than the engine's "
                f"max_cache_bytes of {self.limits.max_cache_bytes:,}: shorten the prompt, ask for "
                "fewer new tokens (max_new_tokens), or give the engine a larger max_cache_bytes"
            )

    def plan(
        self,
        running: Sequence[Need],
        waiting: Waiting,
        first_waiting: Callable[[int], Sequence[Need]],
        *,
        current: BatchShape | None,
    ) -> Plan:
        """Choose the shape of the batch, and how many waiting requests it takes.

        Requests begin in the order in which they came. One that does not fit next to those that
        run waits until it does, and those after it wait too, so that none is starved.

        Args:
            running: what the running requests still need.
            waiting: what the waiting ones need.
            first_waiting: gives the needs of the first n of them, in order.
            current: the shape so far; None: there is no batch.

        Returns:
            The plan; with nothing running it admits at least one request.
        """
        wanted = len(running) + len(waiting)
        needs = [*running, *waiting.kinds()]
        moved = current if running else None  # where nothing runs, the old caches go first
        ahead = self._kept(current, self._least(wanted, needs))
        beside = bool(running) or any(need.in_blocks for need in needs)
        if self.fits(ahead, moved=moved, beside=beside):
            return Plan(ahead, min(len(waiting), ahead.rows - len(running)))
        first = first_waiting(self.most_rows - len(running))
        for count in range(len(first), 0, -1):
            chosen = [*running, *first[:count]]
            smallest = self._smallest(len(running) + count, chosen)
            beside = bool(running) or any(need.in_blocks for need in chosen)
            for shape in (self._kept(current, smallest), smallest, _no_smaller(current, smallest)):
                if self.fits(shape, moved=moved, beside=beside):
                    return Plan(shape, count)
        # Nothing shrinks while a request waits for room: it would be moved twice.
        return Plan(_no_smaller(current, self._smallest(len(running), running)), 0)

    def fits(
        self, shape: BatchShape, *, moved: BatchShape | None = None, beside: bool = False
    ) -> bool:
        """Whether there may be a batch of this shape.

        Args:
            shape: the shape.
            moved: the batch whose running rows move into it; None: there is none.
            beside: whether prompts are read in rows beside it.
        """
        most = self.limits.max_cache_bytes
        return most is None or self._peak(shape, moved=moved, beside=beside) <= most

    def growth(self, values: tuple[int, ...], mapped_slots: int, *, held: BatchShape | None) -> int:
        """Bytes that caches may still take on each device, at their peak, whatever is asked for.

        Args:
            values: the value networks that there are.
            mapped_slots: slots that those with their own vocabulary may need in a row.
            held: the batch that there is; None: there is none.
        """
        capacity = bucket_capacity(self.longest, context=self.longest)
        largest = BatchShape(self.most_rows, capacity, mapped_slots, stop_ids=1, values=values)
        # Rows may move from a batch that is nearly as large.
        most = self.cache_bytes(largest) + self._peak(largest, beside=True)
        if self.limits.max_cache_bytes is not None:
            most = min(most, self.limits.max_cache_bytes)
        return max(0, most - (0 if held is None else self.cache_bytes(held)))

    def _peak(
        self, shape: BatchShape, *, moved: BatchShape | None = None, beside: bool = False
    ) -> int:
        """Bytes of all caches on each device while a batch of this shape is made and used."""
        size = self.cache_bytes(shape)
        if moved is not None and moved.sizes != shape.sizes:
            size += self.cache_bytes(moved)
        return size + (self._beside(shape) if beside else 0)

    def _beside(self, shape: BatchShape) -> int:
        """Bytes of the rows in which prompts are read that join a batch, at most."""
        group = self._rows(usual_group(shape.rows))
        size = self.cache_bytes(shape._replace(rows=group))
        if block := self.limits.prefill_block:
            # Up to a block of short prompts; each has 16 tokens or more, and a slot beyond them.
            short = self._rows(-(-17 * block // (16 * _SHORT_ROW)))
            if short <= shape.rows:
                short_rows = shape._replace(rows=short, capacity=min(shape.capacity, _SHORT_ROW))
                size = max(size, self.cache_bytes(short_rows))
        return size

    def _smallest(self, requests: int, needs: Sequence[Need]) -> BatchShape:
        """The smallest shape that holds this many requests with these needs."""
        return BatchShape(
            rows=self._rows(min(requests, self.limits.max_rows)),
            capacity=bucket_capacity(max(need.slots for need in needs), context=self.longest),
            mapped_capacity=max(need.mapped_slots for need in needs),
            stop_ids=max(need.stop_ids for need in needs),
            values=tuple(sorted({place for need in needs for place in need.values})),
        )

    def _least(self, requests: int, needs: Sequence[Need]) -> BatchShape:
        """As `_smallest`, no smaller than the caller asks."""
        least = Need(min(self.limits.least_capacity, self.longest))
        return self._smallest(max(requests, self.limits.least_rows), [*needs, least])

    def _kept(self, current: BatchShape | None, wanted: BatchShape) -> BatchShape:
        """The current shape, except where it is too small or far too large."""
        if current is None:
            return wanted
        rows, capacity = current.rows, current.capacity
        if wanted.rows > rows:
            # When requests come one by one, this skips some of the buckets on the way.
            rows = min(max(wanted.rows, self._rows(2 * rows)), self.most_rows)
        elif _ROWS_TO_SPARE * wanted.rows <= rows:
            rows = wanted.rows
        if wanted.capacity > capacity or 2 * wanted.capacity <= capacity:
            capacity = wanted.capacity
        return BatchShape(
            rows,
            capacity,
            max(current.mapped_capacity, wanted.mapped_capacity),
            max(current.stop_ids, wanted.stop_ids),
            wanted.values,
        )

    def _rows(self, requests: int) -> int:
        rows = bucket(requests, smallest=1)
        return -(-rows // self.row_multiple) * self.row_multiple


def _no_smaller(current: BatchShape | None, wanted: BatchShape) -> BatchShape:
    """The shape that is wanted, with no size below the current one: nothing moves for less."""
    if current is None:
        return wanted
    sizes = {name: max(size, current.sizes[name]) for name, size in wanted.sizes.items()}
    return BatchShape(**sizes, values=wanted.values)
