"""Confidence intervals by resampling: of means per token, over rows whose tokens go together.

In: sums per row. Out: draws of a mean, and bounds.
"""

import numpy as np
from jaxtyping import Float, Float64


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
        >>> [round(end, 1) for end in percentile_interval(np.arange(101.0))]
        [2.5, 97.5]
    """
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)
