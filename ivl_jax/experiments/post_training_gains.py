"""Gains of the post-training study: over seeds, and as a share of what training the target gains.

In: figures by the name of their measurement. Out: `Estimate`s, empty where a figure is missing.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from ivl_jax.experiments.post_training_plan import (
    SEEDS,
    Kind,
    Measurement,
    Model,
    alone,
    value_on,
)

ABSENT = "–"
CONFIDENCE = 0.95
# One standard error of the difference between two shares of 300 questions is up to 4 points.
LEAST_GAIN = 0.05
Figures = Mapping[str, Mapping[str, Any]]
Make = Callable[[int], Measurement]
# Of a base as it is: no answer has gained more over it than another.
_UNTRAINED = {"pair_accuracy": 0.5}


class Estimate(NamedTuple):
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % t interval of the mean; 0 for a single seed, which has none.

        >>> round(Estimate((1.0, 2.0, 3.0)).half_width, 3)
        2.484
        """
        count = len(self.values)
        if count < 2:
            return 0.0
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return quantile * statistics.stdev(self.values) / math.sqrt(count)

    def show(self, form: str = "{:.3f}") -> str:
        """The mean, and with several seeds half of the interval.

        >>> Estimate((0.5,)).show("{:.1%}"), Estimate(()).show()
        ('50.0%', '–')
        """
        if not self.values:
            return ABSENT
        shown = form.format(self.mean)
        return f"{shown} ± {form.format(self.half_width)}" if len(self.values) > 1 else shown


class Table:
    """Looks figures up by seed."""

    def __init__(self, figures: Figures) -> None:
        """Store the figures."""
        self._figures = figures

    def at(self, measurement: Measurement, key: str) -> float | None:
        """A figure; None: not measured."""
        if measurement.run is None and key in _UNTRAINED:
            return _UNTRAINED[key]
        return self._figures.get(measurement.name, {}).get(key)

    def over_seeds(self, make: Make, key: str) -> Estimate:
        """A figure of every seed that has it."""
        made = {make(seed).name: make(seed) for seed in SEEDS}
        found = [self._figures.get(name, {}).get(key) for name in made]
        return Estimate(tuple(value for value in found if value is not None))

    def gain(self, make: Make, before: Make, key: str) -> Estimate:
        """A figure minus that of another measurement, seed by seed."""
        return Estimate(tuple(self._gains(make, before, key).values()))

    def carried(self, borrowed: Make, own: Make, starts: tuple[Make, Make], key: str) -> Estimate:
        """Mean gain of one model over the mean gain of another.

        A ratio per seed would be ruled by the seed whose own gain happens to be smallest. So this
        is the ratio of the means, R, and seed s counts as R + (b − R o) / mean of o, b and o its
        two gains: their mean is R, and their spread is that of a ratio of means (the delta method),
        uncertainty of the denominator included. A seed whose own gain has not been measured counts
        with the mean of the others.

        Args:
            borrowed: The model whose gain is divided.
            own: The model whose gain divides.
            starts: What each of them gained over.
            key: The figure, a share.

        Returns:
            The ratio; empty where a gain is missing, or where the mean to divide by is below
            `LEAST_GAIN`: it would be a ratio to noise.
        """
        theirs = self._gains(borrowed, starts[0], key)
        ours = self._gains(own, starts[1], key)
        ours = {seed: gain for seed, gain in ours.items() if seed in theirs} or ours
        if not theirs or not ours:
            return Estimate(())
        whole = statistics.fmean(ours.values())
        if whole < LEAST_GAIN:
            return Estimate(())
        ratio = statistics.fmean(theirs.values()) / whole
        return Estimate(
            tuple(
                ratio + (gain - ratio * ours.get(seed, whole)) / whole
                for seed, gain in theirs.items()
            )
        )

    def kept(self, make: Make, whole: Make, base: Model, key: str) -> Estimate:
        """Share of a teacher's gain over the base that arrives in a student, seed by seed."""
        start = self.at(Measurement(base), key)
        if start is None:
            return Estimate(())
        found = [(self.at(make(seed), key), self.at(whole(seed), key)) for seed in SEEDS]
        return Estimate(
            tuple(
                (student - start) / (teacher - start)
                for student, teacher in found
                if student is not None and teacher is not None and teacher != start
            )
        )

    def _gains(self, make: Make, before: Make, key: str) -> dict[int, float]:
        found = {seed: (self.at(make(seed), key), self.at(before(seed), key)) for seed in SEEDS}
        return {s: x - y for s, (x, y) in found.items() if x is not None and y is not None}


def on(base: Model, kind: Kind) -> Make:
    """A base with S's value network, by seed."""
    return lambda seed: value_on(base, kind, seed)


def by_itself(base: Model, kind: Kind) -> Make:
    """A base trained itself, by seed."""
    return lambda seed: alone(base, kind, seed)


def untrained(base: Model) -> Make:
    """A base as it is."""
    return lambda _: Measurement(base)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are right-aligned."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
