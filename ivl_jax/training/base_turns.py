"""Which base each batch of a run is trained beside.

In: the bases' weights and the run's seed. Out: a base for every batch, from its number alone, so
that a run that goes on after a stop meets the same bases in the same order.
"""

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Steps of the golden ratio's fraction fill [0, 1) evenly at every length (discrepancy log n / n).
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class BaseTurns:
    """Takes turns between bases: among any n batches each base has its share within a few.

    Example:
        >>> turns = BaseTurns(weights=(3.0, 1.0), seed=0)
        >>> [turns(batch) for batch in range(8)]
        [1, 0, 0, 0, 0, 1, 0, 0]
    """

    weights: Sequence[float]
    """Each base's share of the batches, relative to the others'."""
    seed: int
    """Of the run; decides where the turns begin."""

    def __call__(self, batch: int) -> int:
        """Give the base of a batch.

        Args:
            batch: its number in the run, from 0.

        Returns:
            The base's index.
        """
        ends = list(itertools.accumulate(self.weights))
        drawn = (random.Random(self.seed).random() + batch * _GOLDEN) % 1.0 * ends[-1]
        return min(bisect.bisect_right(ends, drawn), len(ends) - 1)
