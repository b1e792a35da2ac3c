"""Confidence intervals by resampling: of means per token, over rows whose tokens go together.

In: sums per row. Out: draws of a mean, bounds, and which of several means are above 0.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.special import ndtri, stdtrit


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

    Draws of few rows vary too little, and the normal distribution does not say how far off their
    own spread is. So draws are moved away from the given rows' ratio by t/z · √(n / (n − 1)), with
    the 97.5 % points of Student's t of n − 1 degrees of freedom and of the normal distribution: the
    middle 95 % are then those of the t interval, for n = 5, 8, 12 wider by 58, 29 and 17 %. Of rows
    whose true mean is 0, they leave 0 out in 6, 5 and 5 % of cases if the rows are normally
    distributed (17, 12 and 8 % without), and in 12, 9 and 8 % if they are as skewed as an
    exponential distribution (20, 15 and 13 % without).

    Args:
        numerators: Sums of each row, such as nats; at least two rows.
        denominators: Counts of each row, such as tokens.
        resamples: How often rows are drawn, with replacement.
        seed: Of the draws.

    Returns:
        For each draw Σ numerators / Σ denominators, moved; NaN where no drawn row counts.

    Source:
        B. Efron, "Bootstrap methods: another look at the jackknife", The Annals of Statistics 7
        (1979); the correction: T. C. Hesterberg, "What teachers should know about the bootstrap",
        The American Statistician 69 (2015).

    Example:
        >>> one = np.ones((4, 1))
        >>> np.unique(resample_ratios(3 * one, 2 * one)).tolist()
        [1.5]
    """
    rows = len(numerators)
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    draws = draws.astype(np.float64)
    ratio = numerators.sum(axis=0) / denominators.sum(axis=0)
    with np.errstate(invalid="ignore"):
        drawn = (draws @ numerators) / (draws @ denominators)
    wider = stdtrit(rows - 1, 0.975) / ndtri(0.975) * np.sqrt(rows / (rows - 1))
    return ratio + wider * (drawn - ratio)


def percentile_interval(
    draws: Float[np.ndarray, " R"], *, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval that holds the middle share of some draws; NaN among them is left out.

    Example:
        >>> [round(end, 1) for end in percentile_interval(np.arange(101.0))]
        [2.5, 97.5]
    """
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def reliably_above(
    draws: Float[np.ndarray, "R K"], means: Float[np.ndarray, " K"], *, confidence: float = 0.95
) -> Bool[np.ndarray, " K"]:
    """Which of several means are above 0, so that choosing one of these is not luck.

    The lower ends of simultaneous intervals are compared with 0: each mean minus the same number of
    its standard deviations, so many that only (1 − confidence) / 2 of the draws have any mean
    further above its own. Of K means that are all 0, one is called reliable in 2.5 % of cases,
    however large K is.

    Args:
        draws: From `resample_ratios`, or differences of its columns.
        means: Of the given rows.
        confidence: Of the intervals, all together.

    Source:
        J. P. Romano, M. Wolf, "Exact and approximate stepdown methods for multiple hypothesis
        testing", Journal of the American Statistical Association 100 (2005); its first step.

    Example:
        >>> draws = np.random.default_rng(0).normal([0.1, 5.0], 1.0, size=(2000, 2))
        >>> reliably_above(draws, np.array([0.1, 5.0])).tolist()
        [False, True]
    """
    spread = np.nanstd(draws, axis=0)
    apart = np.zeros_like(draws)
    np.divide(draws - means, spread, out=apart, where=spread > 0)
    bound = np.nanpercentile(apart.max(axis=1), 50 * (1 + confidence))
    return means > bound * spread
