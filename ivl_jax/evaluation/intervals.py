"""Confidence intervals: of proportions, and by resampling of means over rows.

In: successes and trials, or sums per row. Out: bounds.
"""

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Float64


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


def resample_ratios(
    numerators: Float[np.ndarray, "N K"],
    denominators: Float[np.ndarray, "N K"],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Float64[np.ndarray, "R K"]:
    """Ratios of sums over rows, with the rows drawn anew: the bootstrap of a mean per token.

    Rows are drawn, not tokens, because the tokens of one row go together. All columns share the
    draws, so differences between columns may be taken draw by draw.

    Args:
        numerators: Sums of each row, such as nats.
        denominators: Counts of each row, such as tokens.
        resamples: How often rows are drawn, with replacement.
        seed: Of the draws.

    Returns:
        For each draw Σ numerators / Σ denominators; NaN where no drawn row counts.

    Source:
        B. Efron, "Bootstrap methods: another look at the jackknife", The Annals of Statistics 7
        (1979).

    Example:
        >>> one = np.ones((4, 1))
        >>> np.unique(resample_ratios(3 * one, 2 * one)).tolist()
        [1.5]
    """
    rows = len(numerators)
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    draws = draws.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (draws @ numerators) / (draws @ denominators)


def percentile_interval(
    draws: Float[np.ndarray, " R"], *, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval that holds the middle share of some draws; NaN among them is left out.

    Example:
        >>> percentile_interval(np.arange(101.0))
        (2.5, 97.5)
    """
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)
