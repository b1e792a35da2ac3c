"""How a prompt is continued: sampling, limits, and the strengths of the value networks.

In: values from a command line or a caller. Out: a frozen dataclass whose own checks have passed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ivl_jax.config.annotations import NoFlag, Repeatable
from ivl_jax.config.checks import ConfigError, found

LARGEST_STRENGTH = 1e4
"""With value logits of 100 the product is 10⁶, where float32 has steps of 0.06: beyond that the
base's logits are rounded away."""
_MOST_TOP_LOG_PROBS = 100
"""Each kept token has room for so many likeliest ones, in a state that lives on device."""


def strength_problem(alpha: float | int) -> str | None:
    """Say what keeps a number from being a strength; None if nothing does.

    Args:
        alpha: what is given as α.

    Example:
        >>> strength_problem(1e38)
        'must be between -10,000 and 10,000, got 1e+38'
    """
    try:
        finite = math.isfinite(alpha)
    except OverflowError:  # an integer that no float holds
        finite = True
    if not finite:
        return f"must be finite, got {alpha}"
    if abs(alpha) <= LARGEST_STRENGTH:
        return None
    return f"must be between {-LARGEST_STRENGTH:,.0f} and {LARGEST_STRENGTH:,.0f}, {found(alpha)}"


@dataclass(frozen=True)
class GenerationOptions:
    """How a prompt is continued."""

    max_new_tokens: int = 256
    """Tokens generated at most; fewer where the context ends."""
    temperature: float = 0.0
    """0 is greedy: the arg-max, the lowest id among equal logits."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability mass; 1: all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability; 0: none."""
    seed: int = 0
    """Seed of sampling; the prompt's index is folded in, then the token's index."""
    stop: Repeatable[Sequence[str]] = ()
    """String that ends the generation and is cut off; repeat the flag for several."""
    stop_ids: NoFlag[Sequence[int]] = ()
    """Token ids that end the generation, besides those of the models."""
    strengths: NoFlag[Sequence[float] | None] = None
    """α of each value network; None: those of the composed model."""
    log_probs: NoFlag[int | None] = None
    """Log-probabilities (nats) of the generated tokens under the composed distribution, before
    temperature, top-k, top-p and min-p. None: none; 0: of the tokens themselves; k: also of the k
    likeliest tokens at each place."""

    def __post_init__(self) -> None:
        """Check ranges, all problems at once; lists become tuples, so that options can be keys."""
        checks = {
            "max_new_tokens must be ≥ 1": self.max_new_tokens >= 1,
            "temperature must be ≥ 0 and finite": 0 <= self.temperature < math.inf,
            "top_k must be in [0, 2³¹)": 0 <= self.top_k < 2**31,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "min_p must be in [0, 1)": 0 <= self.min_p < 1,
            "seed must be in [0, 2³²)": 0 <= self.seed < 2**32,
            "stop must hold strings that are not empty": not isinstance(self.stop, str)
            and all(self.stop),
            f"log_probs must be None or in [0, {_MOST_TOP_LOG_PROBS}]": self.log_probs is None
            or 0 <= self.log_probs <= _MOST_TOP_LOG_PROBS,
        }
        problems = [
            f"{rule}, {found(getattr(self, rule.split()[0]))}"
            for rule, ok in checks.items()
            if not ok
        ]
        problems += [
            f"strengths {problem}"
            for alpha in self.strengths or ()
            if (problem := strength_problem(alpha))
        ]
        if problems:
            raise ConfigError("generation options: " + "; ".join(problems))
        for name in ("stop", "stop_ids", "strengths"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
