"""Looks a study's figures up by measurement and seed.

In: figures by the name of their measurement. Out: records, and `Estimate`s over seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from ivl_jax.experiments.estimate import Estimate

Figures = Mapping[str, Mapping[str, Any]]


class Named(Protocol):
    """Something that is measured."""

    @property
    def name(self) -> str:
        """No two measurements of a study share one."""
        ...


M = TypeVar("M", bound=Named)


class FiguresBySeed(Generic[M]):
    """Figures of one study."""

    def __init__(self, figures: Figures, seeds: Sequence[int]) -> None:
        """Store the figures.

        Args:
            figures: By the name of their measurement.
            seeds: Of the trainings.
        """
        self._figures = figures
        self.seeds = tuple(seeds)

    def records(self, make: Callable[[int], M]) -> list[Mapping[str, Any]]:
        """What has been measured of a measurement for each seed, none twice."""
        names = dict.fromkeys(make(seed).name for seed in self.seeds)
        return [self._figures[name] for name in names if name in self._figures]

    def over_seeds(self, make: Callable[[int], M], key: str = "nll") -> Estimate:
        """A figure of every seed that has it."""
        found = (record.get(key) for record in self.records(make))
        return Estimate(tuple(value for value in found if value is not None))
