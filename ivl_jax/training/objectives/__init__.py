"""Objectives: what a run minimises. Each is one file in this package and one entry here.

In: a name, or `module:attribute` from the user's own config. Out: an `Objective`.
"""

from ivl_jax.extensions import load_extension
from ivl_jax.training.objectives.objective import Objective
from ivl_jax.training.objectives.sft import SFT

OBJECTIVES = {objective.name: objective for objective in (SFT,)}


def find_objective(name: str) -> Objective:
    """Find an objective by name.

    Args:
        name: a key of `OBJECTIVES`, or `module:attribute` of an `Objective` of your own.

    Returns:
        The objective.

    Raises:
        ValueError: it is neither.
    """
    return load_extension(name, OBJECTIVES, Objective, where="objective")
