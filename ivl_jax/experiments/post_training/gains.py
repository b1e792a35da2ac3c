"""Gains of the post-training study: over seeds, and as a share of what training the target gains.

In: figures by the name of their measurement. Out: `Estimate`s, empty where a figure is missing.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ivl_jax.experiments.estimate import Estimate
from ivl_jax.experiments.figures_by_seed import FiguresBySeed
from ivl_jax.experiments.post_training.plan import (
    Kind,
    Measurement,
    Model,
    alone,
    value_on,
)

# One standard error of the difference between two shares of 300 questions is up to 4 points.
LEAST_GAIN = 0.05
Make = Callable[[int], Measurement]
# Of a base as it is: no answer has gained more over it than another.
_UNTRAINED = {"pair_accuracy": 0.5}


class Table(FiguresBySeed[Measurement]):
    """Figures of the post-training study."""

    def at(self, measurement: Measurement, key: str) -> float | None:
        """A figure; None: not measured."""
        if measurement.run is None and key in _UNTRAINED:
            return _UNTRAINED[key]
        return self._figures.get(measurement.name, {}).get(key)

    def all_of(self, measurement: Measurement) -> Mapping[str, Any] | None:
        """All figures of a measurement; None: not measured."""
        return self._figures.get(measurement.name)

    def gain(self, make: Make, before: Make, key: str) -> Estimate:
        """A figure minus that of another measurement, seed by seed."""
        return Estimate(tuple(self._gains(make, before, key).values()))

    def carried(self, borrowed: Make, own: Make, starts: tuple[Make, Make], key: str) -> Estimate:
        """Mean gain of one model over the mean gain of another.

        A ratio per seed would be ruled by the seed whose own gain happens to be smallest. So this
        is the ratio of the means, R, and seed s counts as R + (b − R o) / mean of o, b and o its
        two gains: their mean is R, and their spread is that of a ratio of means (the delta method),
        uncertainty of the denominator included. That takes two seeds that have both gains; with
        fewer, the ratio is a single number: its spread would be that of a known denominator.

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
        return _ratio_of_means(theirs, self._gains(own, starts[1], key))

    def carried_more_than(
        self, borrowed: Make, own: Make, starts: tuple[Make, Make], key: str
    ) -> float | None:
        """A bound for what is carried where the gain to divide by is too small for a ratio.

        Args:
            borrowed: As in `carried`, like the others.
            own: The model whose gain is too small.
            starts: What each of them gained over.
            key: The figure, a share.

        Returns:
            The mean borrowed gain over `LEAST_GAIN`, which the own gain does not reach; None where
            a gain is missing, where there is a ratio, or where nothing was gained.
        """
        theirs, ours = self._gains(borrowed, starts[0], key), self._gains(own, starts[1], key)
        if not theirs or not ours or _ratio_of_means(theirs, ours).values:
            return None
        gain = statistics.fmean(theirs.values())
        return gain / LEAST_GAIN if gain > 0 else None

    def kept(self, make: Make, whole: Make, base: Model, key: str) -> Estimate:
        """Share of a teacher's gain over the base that arrives in a student.

        Args:
            make: The student.
            whole: The teacher.
            base: What both gained over.
            key: The figure; of `nll`, the lower one is better.

        Returns:
            A ratio of means, as in `carried`.
        """
        start = untrained(base)
        sign = -1.0 if key == "nll" else 1.0
        student, teacher = (
            {seed: sign * gain for seed, gain in self._gains(one, start, key).items()}
            for one in (make, whole)
        )
        return _ratio_of_means(student, teacher)

    def _gains(self, make: Make, before: Make, key: str) -> dict[int, float]:
        found = {s: (self.at(make(s), key), self.at(before(s), key)) for s in self.seeds}
        return {s: x - y for s, (x, y) in found.items() if x is not None and y is not None}


def _ratio_of_means(part: Mapping[int, float], whole: Mapping[int, float]) -> Estimate:
    """Mean of one gain by seed over the mean of another; see `Table.carried`."""
    shared = [seed for seed in part if seed in whole]
    divisor = [whole[seed] for seed in shared] or list(whole.values())
    if not part or not divisor or statistics.fmean(divisor) < LEAST_GAIN:
        return Estimate(())
    mean = statistics.fmean(divisor)
    if len(shared) < 2:
        return Estimate((statistics.fmean(part.values()) / mean,))
    ratio = statistics.fmean(part[seed] for seed in shared) / mean
    return Estimate(tuple(ratio + (part[seed] - ratio * whole[seed]) / mean for seed in shared))


def on(base: Model, kind: Kind) -> Make:
    """A base with S's value network, by seed."""
    return lambda seed: value_on(base, kind, seed)


def by_itself(base: Model, kind: Kind) -> Make:
    """A base trained itself, by seed."""
    return lambda seed: alone(base, kind, seed)


def untrained(base: Model) -> Make:
    """A base as it is."""
    return lambda _: Measurement(base)
