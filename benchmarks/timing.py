"""Times functions, alternating between those to compare, and measures a process's peak memory.

In: functions without arguments. Out: seconds of each repeat, and their median and spread.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Figures(NamedTuple):
    """A summary of repeated measurements."""

    median: float
    """In the unit of the measurement."""
    spread: float
    """Largest minus smallest; 0 if counted rather than timed."""

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figures":
        """Summarise the repeats, at least one."""
        values = list(values)
        return cls(statistics.median(values), max(values) - min(values))


@dataclass(frozen=True)
class Timing:
    """The times of one function.

    Attributes:
        warm_up: Seconds of the first call before the repeats, including compilation; None if none.
        seconds: Seconds of each repeat.
    """

    warm_up: float | None
    seconds: tuple[float, ...]

    @property
    def figures(self) -> Figures:
        """Seconds."""
        return Figures.of(self.seconds)

    def rate(self, amount: float) -> Figures:
        """Amounts per second, if each call does `amount` (tokens, bytes, operations)."""
        return Figures.of(amount / seconds for seconds in self.seconds)


def time_in_turn(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time functions that are to be compared, alternating between them.

    If the machine slows down meanwhile, it slows all of them, and their ratios stay the same.

    Args:
        works: by name, called without arguments. JAX arrays in their results are waited for; they
            must wait for other asynchronous work themselves.
        repeats: timed calls of each, at least 1.
        warm_up: calls of each before timing.

    Returns:
        The times by name.
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
    """Time one function, like `time_in_turn`."""
    return time_in_turn({"work": work}, repeats=repeats, warm_up=warm_up)["work"]


def peak_memory() -> int:
    """This process's peak memory in bytes (Linux's VmHWM).

    Unlike `ru_maxrss` it starts with the program, not with the parent that forked it.
    """
    return _kilobytes("/proc/self/status", "VmHWM")


def resident_memory() -> int:
    """This process's memory in bytes, as it is now (Linux's VmRSS)."""
    return _kilobytes("/proc/self/status", "VmRSS")


def available_memory() -> int:
    """Bytes of memory available without swapping (Linux)."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(file: str, name: str) -> int:
    """The bytes in a kernel file's line `name: … kB`."""
    if Path(file).exists():
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{file} has no {name}: memory is measured only on Linux")


def _seconds(work: Callable[[], object]) -> float:
    import jax  # here, so that --help stays fast

    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started
