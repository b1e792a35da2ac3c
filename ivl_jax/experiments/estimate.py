"""A figure over the seeds of a study, as its tables show it.

In: one number per seed. Out: mean and the half of its confidence interval, as text.
"""

import math
import statistics
from typing import NamedTuple

from scipy.stats import t as student_t

ABSENT = "–"
"""What a table shows where nothing has been measured."""
CONFIDENCE = 0.95


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
