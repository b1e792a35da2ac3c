"""SIGTERM and Ctrl-C become a request that the loop answers at the next step boundary.

In: signals. Out: the name of the one that came, or None.
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_CAUGHT = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


class Interrupts:
    """Context manager that catches SIGTERM and Ctrl-C; a second Ctrl-C aborts at once.

    Outside the main thread signals cannot be caught, and nothing changes.
    """

    def __init__(self) -> None:
        self._came: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            # With several processes JAX's preemption service has SIGTERM: it makes all of them
            # stop at the same step.
            numbers = [signal.SIGINT] if jax.process_count() > 1 else _CAUGHT
            for number in numbers:
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
        """Say whether the run should save and stop after this step.

        Args:
            step: the step just taken; with several processes all of them agree on it.

        Returns:
            The signal's name, or None.
        """
        if jax.process_count() > 1:
            stop = multihost_utils.reached_preemption_sync_point(step)
            return (self._came or "SIGTERM") if stop else None
        return self._came

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._came == "Ctrl-C" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._came = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        remedy = "; Ctrl-C again aborts without saving" if number == signal.SIGINT else ""
        logger.warning("%s: saving at the next step boundary%s", self._came, remedy)
