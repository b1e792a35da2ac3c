"""Compiled programs that a process keeps, within what the operating system grants it.

In: programs that JAX compiles. Out: they are dropped before they are too many. On a CPU each takes
dozens of memory mappings, of which Linux grants a process 65,530 (`vm.max_map_count`) unless it is
told otherwise; where XLA gets none, it ends the process.
"""

import functools
import logging
from pathlib import Path

import jax
import jax.monitoring

logger = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also of programs read from the cache
# Counting 30,000 mappings takes 25 ms; so many programs take some thousand mappings at most.
_PROGRAMS_A_COUNT = 16


class ProgramLimit:
    """Drops all compiled programs once they take half of the mappings that are left for them.

    What is used again is then traced anew, and compiled or read from the compilation cache. There
    is one per process: `program_limit`.
    """

    def __init__(self) -> None:
        self._uncounted = 0
        # Mappings beyond which programs are dropped; None: half of the limit.
        self._most: int | None = None

    def listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Hear of JAX's work; from any thread."""
        del duration_secs, kwargs
        self._uncounted += event == _COMPILED

    def keep(self) -> bool:
        """Drop programs if there are too many; called where none runs for this thread.

        Returns:
            Whether they were dropped.
        """
        if self._uncounted < _PROGRAMS_A_COUNT:
            return False
        self._uncounted = 0
        count, limit = mappings(), most_mappings()
        if count is None or limit is None:
            return False
        if count <= (limit // 2 if self._most is None else self._most):
            return False
        jax.clear_caches()
        left = mappings() or 0
        # What else the process maps stays, and is not to be dropped again and again.
        self._most = (left + limit) // 2
        logger.info(
            "dropped the compiled programs, which took %d of the %d memory mappings that "
            "vm.max_map_count grants: those that are used again are compiled again, or read from "
            "the compilation cache",
            count - left,
            limit,
        )
        return True


@functools.cache
def program_limit() -> ProgramLimit:
    """The limit of this process, which hears of each program from now on."""
    limit = ProgramLimit()
    jax.monitoring.register_event_duration_secs_listener(limit.listen)
    return limit


def mappings() -> int | None:
    """Memory mappings of this process; None where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return None


def most_mappings() -> int | None:
    """Memory mappings that the system grants a process; None where it has no such limit."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
