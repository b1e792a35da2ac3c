"""Confidence intervals of proportions.

In: successes and trials. Out: bounds.
"""

import math
from statistics import NormalDist


def wilson_interval(
    successes: int, trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """The Wilson score interval of a proportion.

    Args:
        successes: number of successful trials.
        trials: number of trials, at least 1.
        confidence: of the interval, in (0, 1).

    Returns:
        Lower and upper bound, within [0, 1] and never of zero width, even with no or only
        successes.

    Raises:
        ValueError: no trials, or more successes than trials.

    Source:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        Journal of the American Statistical Association 22 (1927).

    Example:
        >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
        [0.4902, 0.9433]
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"expected 0 ≤ successes ≤ trials, got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
