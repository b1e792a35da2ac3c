"""Objectives: what a run minimises. Each is one file in this package and one entry here.

In: a name, or `module:attribute` from the user's own config. Out: an `Objective`.
"""

from ivl_jax.config import TrainConfig
from ivl_jax.extensions import load_extension
from ivl_jax.training.objectives.distil import DISTIL
from ivl_jax.training.objectives.dpo import DPO
from ivl_jax.training.objectives.grpo import GRPO
from ivl_jax.training.objectives.objective import Objective
from ivl_jax.training.objectives.sft import SFT

OBJECTIVES = {objective.name: objective for objective in (SFT, DPO, DISTIL, GRPO)}


def find_objective(config: TrainConfig) -> Objective:
    """Find the objective of a run, by name.

    Args:
        config: whose `objective` is a key of `OBJECTIVES`, or `module:attribute` of an `Objective`
            of the user's own.

    Returns:
        The objective, with the run's options.

    Raises:
        ValueError: there is no such objective.
    """
    found = load_extension(config.objective, OBJECTIVES, Objective, where="objective")
    return found if found.configure is None else found.configure(config)
