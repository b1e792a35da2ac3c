"""Reports a run's progress and records its figures.

In: metrics of a step, figures of an evaluation. Out: a progress bar, one console line per log
interval, metrics.jsonl, timings.jsonl and what the trackers show.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import jax
import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ivl_jax.config import TrackerName
from ivl_jax.training.evaluation import Evaluation
from ivl_jax.training.rollouts import SamplingProgress, Watch
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.trackers import open_trackers

logger = logging.getLogger(__name__)

_SAMPLING_LINE_SECONDS = 30.0  # between two lines of a log file about one batch of answers


class Reporter:
    """Reports one run; on processes other than 0 it only keeps time."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        trackers: Sequence[TrackerName],
        first_step: int,
        total_steps: int,
        shown: Sequence[str],
    ) -> None:
        """Open the trackers and the progress bar.

        Args:
            run: the run directory.
            trackers: `logging.trackers`.
            first_step: steps taken before this start.
            total_steps: steps of the whole run.
            shown: figures on the console line beside the loss, those that a step has.
        """
        self._run = run
        self._shown = shown
        self._total = total_steps
        self._writes = jax.process_index() == 0
        self._trackers = open_trackers(trackers, run, first_step=first_step) if self._writes else []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            # In a log file a bar would only be noise between the lines.
            disable=not (self._writes and rich.get_console().is_terminal),
        )
        self._task: TaskID | None = None
        self._first = first_step
        self._tokens = 0.0
        self._steps = 0
        self._since = time.perf_counter()
        self._seconds = 0.0
        self._sampling_seconds = 0.0
        self._sampled_tokens = 0

    def __enter__(self) -> "Reporter":
        self._progress.start()
        self._task = self._progress.add_task("training", total=self._total, completed=self._first)
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()
        self._run.close_records()

    def step(self, step: int, metrics: Mapping[str, float], *, base: str, record: bool) -> None:
        """Count a step, and record it if `record` is set.

        Args:
            step: its number, from 1.
            metrics: `StepMetrics` as floats.
            base: with several bases, the base of its batch; else empty.
            record: whether this step ends a log interval.
        """
        self._tokens += metrics["real_tokens"]
        self._steps += 1
        if self._task is not None:
            self._progress.update(self._task, completed=step)
        if not (record and self._writes):
            return
        self._run.metrics.append({"step": step, **({"base": base} if base else {}), **metrics})
        seconds = (self._seconds + time.perf_counter() - self._since) / self._steps
        speed = self._tokens / self._steps / seconds
        # The first step of a start includes compilation, so it cannot be extrapolated.
        remaining = "—" if step == self._first + 1 else _clock(seconds * (self._total - step))
        timings = {"seconds_per_step": seconds, "tokens_per_second": speed}
        sampling = ""
        if self._sampling_seconds:
            sampled = self._sampled_tokens / self._sampling_seconds
            share = self._sampling_seconds / (seconds * self._steps)
            timings |= {
                "sampling_seconds_per_step": self._sampling_seconds / self._steps,
                "sampled_tokens_per_second": sampled,
                "sampling_share": share,
            }
            sampling = f" · sampling {share:.0%} of the time, {sampled:,.0f} tokens/s"
        self._run.timings.append({"step": step, **timings})
        logger.info(
            "step %d/%d%s · loss %.4f%s · lr %.2e · grad norm %.3g · %s tokens/s%s · ETA %s",
            step,
            self._total,
            f" · base {base}" if base else "",
            metrics["loss"],
            "".join(
                f" · {name.replace('_', ' ')} {metrics[name]:.4f}"
                for name in self._shown
                if name in metrics
            ),
            metrics["learning_rate"],
            metrics["gradient_norm"],
            f"{speed:,.0f}",
            sampling,
            remaining,
        )
        self._scalars("train", {**metrics, **timings}, step)
        self._tokens, self._steps, self._seconds = 0.0, 0, 0.0
        self._sampling_seconds, self._sampled_tokens = 0.0, 0
        self._since = time.perf_counter()

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record a held-out evaluation.

        Args:
            step: steps taken.
            evaluation: its figures.
        """
        if not self._writes:
            return
        record: dict[str, Any] = {"step": step, "held_out": evaluation.mean}
        if evaluation.by_base:
            record["held_out_by_base"] = evaluation.by_base
        self._run.metrics.append(record)
        for name, figures in (evaluation.by_base or {"": evaluation.mean}).items():
            base = f" with {name}" if name else ""
            text = _evaluation_text(figures)
            logger.info("held out after step %d/%d%s · %s", step, self._total, base, text)
            if name:
                self._scalars(f"held_out/{name}", figures, step)
        self._scalars("held_out", evaluation.mean, step)

    def copy_events(self) -> None:
        """Copy the events so far to a run directory on an object store."""
        for tracker in self._trackers:
            tracker.copy()

    @contextmanager
    def aside(self, what: str, count: int | None = None) -> Iterator[Callable[[], None]]:
        """Show work that is not a training step, and exclude it from tokens/s.

        Args:
            what: its name next to the bar.
            count: number of its parts; None: unknown.

        Yields:
            A function to call after each part.
        """
        self._seconds += time.perf_counter() - self._since
        task = self._progress.add_task(what, total=count)
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)
            self._since = time.perf_counter()

    @contextmanager
    def sampling(self, what: str, *, counted: bool = True) -> Iterator[Watch]:
        """Show how far the sampling of answers has come, and time it.

        Args:
            what: its name next to the bar; where there is no terminal, a line every half minute.
            counted: whether it belongs to the training steps, and so to their timings.

        Yields:
            A function to call with each `SamplingProgress`.
        """
        task = self._progress.add_task(what, total=None)
        started = shown = time.perf_counter()
        tokens = 0

        def show(progress: SamplingProgress) -> None:
            nonlocal shown, tokens
            tokens = progress.tokens
            self._progress.update(task, total=progress.asked, completed=progress.answers)
            now = time.perf_counter()
            if self._progress.disable and now - shown >= _SAMPLING_LINE_SECONDS:
                shown = now
                logger.info(
                    "%s: %d of %d answers · %s tokens, %s tokens/s",
                    what,
                    progress.answers,
                    progress.asked,
                    f"{tokens:,}",
                    f"{tokens / (now - started):,.0f}",
                )

        try:
            yield show
        finally:
            self._progress.remove_task(task)
            if counted:
                self._sampling_seconds += time.perf_counter() - started
                self._sampled_tokens += tokens

    def _scalars(self, group: str, figures: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.add(group, figures, step)


def _evaluation_text(figures: Mapping[str, float]) -> str:
    if not {"nll", "accuracy"} <= figures.keys():  # another objective than cross-entropy
        return " · ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()
        )
    if not {"base_nll", "base_accuracy", "mean_abs_value"} <= figures.keys():
        return f"nll {figures['nll']:.4f} · accuracy {figures['accuracy']:.2%}"
    return (
        f"base nll {figures['base_nll']:.4f}, accuracy {figures['base_accuracy']:.2%} · "
        f"with value nll {figures['nll']:.4f}, accuracy {figures['accuracy']:.2%}, "
        f"mean |z_value| {figures['mean_abs_value']:.3f}"
    )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
