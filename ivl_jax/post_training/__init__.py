"""Training on answers that the model samples itself: rollouts by the engine, updates by the step.

    ivl_jax.post_training.run("configs/demo_grpo.toml")

In: a config. Out: what `ivl_jax.training.loop.run` returns. Objectives that need no samples run as
they do there. Training and decoding do not know each other; this package gives the one to the
other: `sampler` answers prompts, `rollouts` makes batches of the answers.
"""

import os
from collections.abc import Mapping
from typing import Any

from ivl_jax.config import ConfigError, TrainConfig, train_config_of
from ivl_jax.post_training.reward_trial import first_demonstrations, try_rewards
from ivl_jax.post_training.rollouts import PlainRollouts, RewardedRollouts
from ivl_jax.post_training.sampler import Sampler
from ivl_jax.rewards import WeightedReward, find_reward
from ivl_jax.training import loop
from ivl_jax.training.loop import TrainResult
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.rollouts import Rollouts
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.setup import Data, Preparation
from ivl_jax.training.used_weights import UsedWeights


def run(config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any]) -> TrainResult:
    """Train according to a config, with rollouts where the objective needs them.

    Args:
        config: as `ivl_jax.training.loop.run` takes it.

    Returns:
        The result.

    Raises:
        ConfigError: the config cannot work; also for a reward that does not exist, or that fails
            on the rows' own answers.
        RewardError: a reward function raised or returned something else than a finite number.
    """
    config = train_config_of(config)
    rewards = _find_rewards(config)

    def make_rollouts(
        config: TrainConfig,
        prepared: Preparation,
        weights: UsedWeights,
        directory: RunDirectory,
    ) -> Rollouts:
        sampling = prepared.objective.sampling
        assert sampling is not None, "only objectives that sample need rollouts"
        sampler = Sampler(config, prepared, weights, sampling, samples_file=directory.samples)
        if not sampling.rewarded:
            return PlainRollouts(sampler)
        standardised = config.grpo.advantage == "standardised"
        return RewardedRollouts(sampler, rewards, standardised=standardised)

    def check_data(data: Data) -> None:
        sampling = find_objective(config).sampling
        if sampling is not None and sampling.rewarded:
            try_rewards(rewards, first_demonstrations(data.train))

    return loop.run(config, make_rollouts=make_rollouts, check_data=check_data)


def _find_rewards(config: TrainConfig) -> list[WeightedReward]:
    options = config.grpo
    weights = options.reward_weights or (1.0,) * len(options.rewards)
    try:
        return [
            (name, find_reward(name, where="grpo.rewards"), weight)
            for name, weight in zip(options.rewards, weights, strict=True)
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error
