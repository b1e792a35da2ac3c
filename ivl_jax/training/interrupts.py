"""Turns SIGTERM, SIGHUP and Ctrl-C into a request that the loop handles at the next step boundary.

In: signals. Out: the name of the one received, or None.
"""

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_NAMES: dict[int, str] = {
    getattr(signal, name): {"SIGINT": "Ctrl-C"}.get(name, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
}
# A closing terminal may send SIGHUP more than once; the others abort the second time.
_ABORTING = (signal.SIGTERM, signal.SIGINT)
# GNU timeout sends SIGTERM to its child and then to the child's group, microseconds apart.
_SAME_REQUEST_SECONDS = 0.1

logger = logging.getLogger(__name__)


class AbortedError(KeyboardInterrupt):
    """A second signal of the same kind: the run ends at once, without another save.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(_NAMES[number])
        self.number = number


class Interrupts:
    """Context manager that catches SIGTERM, SIGHUP and Ctrl-C; the second of a kind aborts at once.

    A signal that the process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
    Outside the main thread signals cannot be caught, so this does nothing.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._last: dict[int, float] = {}
        """Signal → when it was received, in seconds of the monotonic clock."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                # With several processes JAX's preemption service handles SIGTERM: it makes all of
                # them stop at the same step.
                if number == signal.SIGTERM and jax.process_count() > 1:
                    continue
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def requested(self, step: int) -> str | None:
        """Whether the run should save and stop after this step.

        Args:
            step: the step just taken; the same in all processes.

        Returns:
            The signal's name, or None.
        """
        if jax.process_count() > 1:
            stop = multihost_utils.reached_preemption_sync_point(step)
            return (self._received or "SIGTERM") if stop else None
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        now, last = time.monotonic(), self._last.get(number)
        if last is not None:
            if number in _ABORTING and (
                number == signal.SIGINT or now - last > _SAME_REQUEST_SECONDS
            ):
                # A third signal ends the process immediately.
                signal.signal(number, signal.SIG_DFL)
                raise AbortedError(number)
            return
        self._last[number] = now
        self._received = _NAMES[number]
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        again = f"; {self._received} again aborts without saving" if number in _ABORTING else ""
        logger.warning("%s: saving at the next step boundary%s", self._received, again)
