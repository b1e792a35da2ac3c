"""Times pieces of work, those to be compared in turn, and the memory a process came to hold.

In: functions without arguments. Out: seconds of each repeat, and their median and spread.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Figures(NamedTuple):
    """What many repeats of one measurement come to."""

    median: float
    """In the unit of the measurement."""
    spread: float
    """Largest minus smallest; 0 for what is counted rather than timed."""

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figures":
        """Summarise the repeats, at least one."""
        values = list(values)
        return cls(statistics.median(values), max(values) - min(values))


@dataclass(frozen=True)
class Timing:
    """The times of one piece of work.

    Attributes:
        warm_up: Seconds of the first call before the repeats, compilation included; None without.
        seconds: Seconds of each repeat.
    """

    warm_up: float | None
    seconds: tuple[float, ...]

    @property
    def figures(self) -> Figures:
        """Seconds."""
        return Figures.of(self.seconds)

    def rate(self, amount: float) -> Figures:
        """Amounts a second, where each call does `amount` (tokens, bytes, operations)."""
        return Figures.of(amount / seconds for seconds in self.seconds)


def time_in_turn(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time pieces of work that are compared, one call of each after the other.

    A machine that slows down in the middle then slows all of them, and their ratios stay.

    Args:
        works: by name, called without arguments. JAX arrays in what they return are waited for;
            any other asynchronous work they must wait for themselves.
        repeats: timed calls of each, at least 1.
        warm_up: calls of each before.

    Returns:
        By name, the times.
    """
    first = {name: [_seconds(work) for _ in range(warm_up)] for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(_seconds(work))
    return {
        name: Timing(first[name][0] if warm_up else None, tuple(seconds[name])) for name in works
    }


def time_work(work: Callable[[], object], *, repeats: int, warm_up: int = 1) -> Timing:
    """Time one piece of work, as `time_in_turn` does."""
    return time_in_turn({"work": work}, repeats=repeats, warm_up=warm_up)["work"]


def peak_memory() -> int:
    """The most bytes of memory this process held at once since it started (Linux' VmHWM).

    Unlike `ru_maxrss` it starts anew with the program, not with the parent that forked it.
    """
    return _kilobytes("/proc/self/status", "VmHWM")


def available_memory() -> int:
    """Bytes of memory that new work may take without pushing other work out (Linux)."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, name: str) -> int:
    """The bytes that a file of the kernel gives as `name: … kB`."""
    if Path(file).exists():
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{file} does not tell {name}: memory is measured on Linux only")


def _seconds(work: Callable[[], object]) -> float:
    import jax  # here, so that --help stays fast

    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started
