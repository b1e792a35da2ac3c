"""How the strength of value networks varies with the position: a policy's name and its parameter.

In: values from a command line, a request or a caller. Out: a frozen dataclass whose ranges have
been checked. What each policy computes is in `ivl_jax.composed.strength_policies`.
"""

import math
from dataclasses import dataclass

from ivl_jax.config.checks import found, require

CONSTANT = "constant"
"""The policy that applies the full strength everywhere."""
SMALLEST_SCALE = 1e-6
LARGEST_SCALE = 1e6


@dataclass(frozen=True)
class StrengthPolicy:
    """Which share of the strengths α applies at each position; α itself is the most that does."""

    name: str = CONSTANT
    """`constant` applies all of α; `entropy` applies α · H / (H + scale), H the entropy of the
    base's prediction; `kl` applies α · scale / (scale + D), D = KL(composition at α ‖ base)."""
    scale: float = 1.0
    """The H or D at which half of α applies (nats); nothing to `constant`."""

    def __post_init__(self) -> None:
        """Check the range; the name is compared with the policies that there are later."""
        problem = policy_scale_problem(self.scale)
        require(problem is None, f"strength_policy: the scale {problem}")

    @property
    def is_constant(self) -> bool:
        """Whether the full strength applies everywhere."""
        return self.name == CONSTANT


def policy_scale_problem(scale: float) -> str | None:
    """Say what is wrong with a policy's scale; None if nothing is.

    Args:
        scale: in nats.

    Example:
        >>> policy_scale_problem(0.0)
        'must be between 1e-06 and 1e+06 nats, got 0.0'
    """
    if SMALLEST_SCALE <= scale <= LARGEST_SCALE and math.isfinite(scale):
        return None
    return f"must be between {SMALLEST_SCALE:g} and {LARGEST_SCALE:g} nats, {found(scale)}"


FULL_STRENGTH = StrengthPolicy()
"""All of α everywhere."""
