"""Looks up the matrix's figures, and sums them up over seeds and items.

In: figures by the name of their measurement. Out: `Estimate`s over seeds, and intervals from
drawing people and modules anew.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from ivl_jax.evaluation.resampling import percentile_interval, resample_ratios
from ivl_jax.experiments.estimate import ABSENT, Estimate
from ivl_jax.experiments.figures_by_seed import FiguresBySeed
from ivl_jax.experiments.held_out_figures import GroupSums, group_sums_from
from ivl_jax.experiments.transfer.matrix import Base, Measurement, reference

Make = Callable[[int], Measurement]
"""Seed → what is measured."""


class Interval(NamedTuple):
    """A 95 % interval over items."""

    low: float
    high: float

    def show(self, form: str = "{:.2f}") -> str:
        """Both bounds, in brackets."""
        return f"[{form.format(self.low)}, {form.format(self.high)}]"


class Table(FiguresBySeed[Measurement]):
    """Figures of the matrix."""

    def one(self, measurement: Measurement, key: str = "nll") -> float | None:
        """A figure of one measurement; None: not measured."""
        return self._figures.get(measurement.name, {}).get(key)

    def ratio(self, base: Base, make: Make, key: str = "nll") -> Estimate:
        """Share of the mean gain of fine-tuning a base, for every seed.

        Args:
            base: What is fine-tuned; chosen by NLL.
            make: What is compared with it.
            key: `nll`, or that of one kind of question.
        """
        alone, tuned = self.one(Measurement(base), key), self.over_seeds(reference(base), key)
        if alone is None or not tuned.values:
            return Estimate(())
        found = self.over_seeds(make, key).values
        return Estimate(tuple((alone - nll) / (alone - tuned.mean) for nll in found))

    def recalled(self, base: Base, make: Make) -> Estimate:
        """Facts answered as a share of those that a base recalls, for every seed."""
        known = self.one(Measurement(base), "recall")
        found = self.over_seeds(make, "exact_match").values
        return Estimate(tuple(each / known for each in found) if known else ())

    def ratio_interval(self, base: Base, make: Make) -> Interval | None:
        """The interval of `ratio`, the mean over seeds, with people and modules drawn anew.

        Args:
            base: As for `ratio`, like the next.
            make: What is compared.

        Returns:
            The interval; None where a sum by group is missing.
        """
        alone = self._groups(lambda seed: Measurement(base))
        tuned, other = self._groups(reference(base)), self._groups(make)
        if not alone or not tuned or not other:
            return None
        start = _mean([each.nats for each in alone])
        gained, whole = (start - _mean([each.nats for each in some]) for some in (other, tuned))
        return Interval(
            *percentile_interval(resample_ratios(gained[:, None], whole[:, None])[:, 0])
        )

    def share_interval(self, make: Make) -> Interval | None:
        """The interval of the facts answered, the mean over seeds, with people drawn anew."""
        groups = self._groups(make)
        if not groups:
            return None
        right = _mean([each.right for each in groups])
        asked = _mean([each.asked for each in groups])
        people = asked > 0
        if people.sum() < 2:
            return None
        drawn = resample_ratios(right[people][:, None], asked[people][:, None])
        low, high = percentile_interval(drawn[:, 0])
        return Interval(max(low, 0.0), min(high, 1.0))

    def _groups(self, make: Make) -> list[GroupSums]:
        texts = [record.get("groups") for record in self.records(make)]
        return [group_sums_from(text) for text in texts if text]


def with_interval(found: Estimate, interval: Interval | None, form: str = "{:.2f}") -> str:
    """A mean over seeds with its interval over items."""
    if not found.values:
        return ABSENT
    shown = form.format(found.mean)
    return shown if interval is None else f"{shown} {interval.show(form)}"


def _mean(arrays: Sequence[Float64[np.ndarray, " G"]]) -> Float64[np.ndarray, " G"]:
    return np.mean(np.stack(arrays), axis=0)
