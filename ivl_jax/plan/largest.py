"""Finds the largest batch or length that fits, with few compilations.

In: a function that compiles a size and returns the peak. Out: the largest size whose own program
was compiled and fits. Peaks grow almost linearly in both, so two of them predict the limit, and
each further compilation corrects the prediction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ivl_jax.config import TrainConfig
from ivl_jax.plan.machines import Machine
from ivl_jax.plan.training import TrainingPlan, plan_training
from ivl_jax.training.objectives import find_objective

_COMPILATIONS = 5  # beside the first, whose peak is known
_TOKENS = 128  # lengths are multiples of this: a vector register's lanes
_MAX_GROWTH = 64  # times the config's own size: what grows further is not limited by memory


class Peak(NamedTuple):
    """Bytes per device of a compiled size."""

    size: int
    peak: int
    fits: bool


class Largest(NamedTuple):
    """The largest sizes of a run that fit; each with the other as in the config."""

    rows: int
    """Of a global batch, in as many micro-batches as the config has; 0: no batch fits."""
    length: int
    """Tokens per row; 0: no length fits."""


def find_largest(config: TrainConfig, machine: Machine, plans: Sequence[TrainingPlan]) -> Largest:
    """Compile larger or smaller batches and lengths until the largest that fit are known.

    Args:
        config: of the run.
        machine: where it would run.
        plans: of the config itself, from `plan_training`.

    Returns:
        The largest of each; the search stops at 64 × the config's own size.
    """
    step, length = config.step, config.data.max_length
    sampling = find_objective(config).sampling
    group = 1 if sampling is None else sampling.group_size
    together = math.lcm(step.micro_batches * plans[0].ways, group)  # rows that are added at once

    def with_rows(rows: int) -> TrainConfig:
        return replace(config, step=replace(step, batch_size=rows * together))

    def with_length(tokens: int) -> TrainConfig:
        data = replace(config.data, max_length=tokens, beyond_context=True)
        return replace(config, data=data)

    def search(first: int, step: int, changed: Callable[[int], TrainConfig]) -> int:
        def measure(size: int) -> Peak:
            return _peak(size, plan_training(changed(size), machine))

        return largest_that_fits(
            measure,
            _peak(first, plans),
            available=machine.memory,
            step=step,
            limit=_MAX_GROWTH * first,
        )

    rows = search(step.batch_size // together, 1, with_rows)
    return Largest(rows * together, search(length, min(_TOKENS, length), with_length))


def _peak(size: int, plans: Sequence[TrainingPlan]) -> Peak:
    return Peak(size, max(plan.peak for plan in plans), all(plan.fits for plan in plans))


def largest_that_fits(
    measure: Callable[[int], Peak], first: Peak, *, available: int, step: int, limit: int
) -> int:
    """Search for the largest size.

    Args:
        measure: compiles a size; may be refused, but then still returns the peak.
        first: of the size that is known.
        available: bytes that a device has.
        step: sizes are multiples of this.
        limit: the largest size to try.

    Returns:
        The largest size that was compiled and fits; 0 if none does.

    Example:
        >>> def measure(size):  # 3 bytes of parameters and 2 per row
        ...     return Peak(size, 3 + 2 * size, 3 + 2 * size <= 100)
        >>> largest_that_fits(measure, measure(4), available=100, step=4, limit=1000)
        48
    """
    known = {first.size: first}

    def best() -> Peak | None:
        return max((one for one in known.values() if one.fits), default=None)

    candidate = first.size * 2 if first.fits else first.size // 2
    for _ in range(_COMPILATIONS):
        candidate = min(max(candidate // step, 1) * step, limit)
        smallest_refused = min((one.size for one in known.values() if not one.fits), default=None)
        if smallest_refused is not None:
            candidate = min(candidate, (smallest_refused - 1) // step * step)
        if candidate < step or candidate in known:
            break
        known[candidate] = measure(candidate)
        candidate = _predict(list(known.values()), available)
        found = best()
        if found is not None and candidate < found.size + step:
            break
    found = best()
    return 0 if found is None else found.size


def _predict(peaks: list[Peak], available: int) -> int:
    """The size at which a line through two peaks meets the limit.

    One is above it and one below, where both are known.
    """
    nearest = sorted(peaks, key=lambda each: abs(each.peak - available))
    one = nearest[0]
    other = next((each for each in nearest if each.fits != one.fits), nearest[1])
    slope = (other.peak - one.peak) / (other.size - one.size)
    if slope <= 0:
        return 2 * max(one.size, other.size)
    return int(one.size + (available - one.peak) / slope)
