"""Tries reward functions on references, before any weight is read.

In: the rewards of a run and its training demonstrations. Out: nothing, an error that names the row,
or a warning about a reward that no reference earns.
"""

import logging
from collections.abc import Sequence

from ivl_jax.config import ConfigError
from ivl_jax.data.batching import TrainIterator
from ivl_jax.data.formats import Demonstration
from ivl_jax.post_training.answers import sample_of
from ivl_jax.rewards import RewardError, WeightedReward, weighted_reward

logger = logging.getLogger(__name__)

_TRIED = 8  # references; each costs a call of every reward function


def first_demonstrations(train: TrainIterator) -> list[Demonstration]:
    """The demonstrations of the first batches, as many as are tried."""
    found: list[Demonstration] = []
    for batch in range(min(_TRIED, train.steps_per_epoch)):
        found += train.demonstrations(batch)
    return found[:_TRIED]


def try_rewards(rewards: Sequence[WeightedReward], demonstrations: Sequence[Demonstration]) -> None:
    """Reward references as if they were sampled answers.

    Args:
        rewards: name, function and weight of each.
        demonstrations: whose references are tried.

    Raises:
        ConfigError: a function raised, or returned anything other than a finite number; names the
            function, the row and its answer.
    """
    earned = {name: False for name, _, weight in rewards if weight > 0}
    for one in demonstrations:
        try:
            _, each = weighted_reward(rewards, sample_of(one, one.messages[-1].content))
        except RewardError as error:
            raise ConfigError(
                f"grpo.rewards, tried on the rows' own answers before training: {error}"
            ) from error
        earned = {name: found or each[name] != 0 for name, found in earned.items()}
    for name, found in earned.items():
        if not found and demonstrations:
            logger.warning(
                "grpo.rewards: %s is 0 for the rows' own answers, all %d tried, such as %s, "
                "%.200r: unless it only punishes, check its pattern and the form of the references",
                name,
                len(demonstrations),
                demonstrations[0].row_id,
                demonstrations[0].messages[-1].content,
            )
