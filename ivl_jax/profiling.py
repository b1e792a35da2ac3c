"""A trace of a few steps for TensorBoard or xprof; the caller defines what a step is.

In: a folder, and each step as it begins. Out: trace files in that folder.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import jax

logger = logging.getLogger(__name__)

_SKIPPED = 2  # steps after a start: compilation and remaining one-time setup
_TRACED = 5


class StepProfile:
    """Traces the third to seventh step after a start; a context manager around the loop."""

    def __init__(self, folder: str, *, first_step: int, name: str) -> None:
        """Set where the trace is written.

        Args:
            folder: where; empty: no trace.
            first_step: steps taken before this start.
            name: what the steps are called in the trace.
        """
        self._folder = folder
        self._begin = first_step + _SKIPPED
        self._end = self._begin + _TRACED
        self._name = name
        self._running = False
        self._written = False

    def step(self, step: int, last_results: Any) -> AbstractContextManager[Any]:
        """Mark a step in the trace; starts or stops the trace when it is due.

        Args:
            step: steps taken before this one.
            last_results: arrays of the previous step, waited for when the trace starts or stops, so
                that it contains whole steps.

        Returns:
            The context in which the step is dispatched.
        """
        if not self._folder:
            return nullcontext()
        if step in (self._begin, self._end):
            jax.block_until_ready(last_results)
        if step == self._begin and not self._written:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step == self._end:
            self._stop()
        return jax.profiler.StepTraceAnnotation(self._name, step_num=step)

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        if self._folder and not self._written:
            logger.warning(
                "no trace in %s: tracing starts after %d %s steps, and there were no more",
                self._folder,
                _SKIPPED,
                self._name,
            )

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._written = False, True
            first, last = self._begin + 1, self._end
            logger.info("trace of %s steps %d–%d: %s", self._name, first, last, self._folder)


NO_PROFILE = StepProfile("", first_step=0, name="")
"""Traces nothing."""
