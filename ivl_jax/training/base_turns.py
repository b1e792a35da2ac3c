"""Chooses the base for each batch of a run.

In: the bases' weights and the run's seed. Out: a base for every batch, determined by the batch's
number alone, so that a resumed run uses the same bases in the same order.
"""

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

# Multiples of the golden ratio modulo 1 fill [0, 1) evenly at every length (discrepancy log n / n).
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class BaseTurns:
    """Alternates between bases: in any n batches, each base gets its share to within a few.

    Example:
        >>> turns = BaseTurns(weights=(3.0, 1.0), seed=0)
        >>> [turns(batch) for batch in range(8)]
        [1, 0, 0, 0, 0, 1, 0, 0]
    """

    weights: Sequence[float]
    """Each base's share of the batches, relative to the others'."""
    seed: int
    """The run's seed; decides where the sequence begins."""

    def __call__(self, batch: int) -> int:
        """The base of a batch.

        Args:
            batch: its number in the run, from 0.

        Returns:
            The base's index.
        """
        ends = list(itertools.accumulate(self.weights))
        drawn = (random.Random(self.seed).random() + batch * _GOLDEN) % 1.0 * ends[-1]
        return min(bisect.bisect_right(ends, drawn), len(ends) - 1)
