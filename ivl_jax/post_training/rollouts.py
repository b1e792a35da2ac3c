"""What objectives make of sampled answers: batches of a step, and held-out figures.

In: a `Sampler`. Out: `ivl_jax.training.rollouts.Rollouts`: answers as they are (a teacher says what
they should have been), or answers with rewards, compared within each prompt's group.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ivl_jax.data.batching import Batch
from ivl_jax.data.formats import Demonstration
from ivl_jax.model.decoder import Params
from ivl_jax.post_training.answers import Answers
from ivl_jax.post_training.sampler import Sampler
from ivl_jax.rewards import WeightedReward, weighted_reward
from ivl_jax.training.objectives.grpo import advantages
from ivl_jax.training.programs import BaseProgram
from ivl_jax.training.rollouts import SamplingProgress, Watch

_ANSWERED_TOGETHER = 512


class PlainRollouts:
    """Answers as they are; held-out figures are those of the given answers alone."""

    def __init__(self, sampler: Sampler) -> None:
        """Store the sampler."""
        self._sampler = sampler

    def batch(
        self,
        params: Params,
        step: int,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> tuple[Batch, Mapping[str, float]]:
        """See `Rollouts`."""
        answers = self._sampler.sample(params, step, demonstrations, program, watch=watch)
        self._sampler.write(step, answers, {})
        return self._sampler.batch(answers), answers.figures()

    def evaluate(
        self,
        params: Params,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> Mapping[str, float]:
        """See `Rollouts`."""
        del params, demonstrations, program, watch
        return {}


class RewardedRollouts:
    """Answers with rewards, and how much better each is than the others to its prompt."""

    def __init__(
        self, sampler: Sampler, rewards: Sequence[WeightedReward], *, standardised: bool
    ) -> None:
        """Store the sampler and the rewards.

        Args:
            sampler: answers prompts.
            rewards: what answers are worth.
            standardised: as `advantages` takes it.
        """
        self._sampler = sampler
        self._rewards = rewards
        self._standardised = standardised

    def batch(
        self,
        params: Params,
        step: int,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> tuple[Batch, Mapping[str, float]]:
        """See `Rollouts`."""
        answers = self._sampler.sample(params, step, demonstrations, program, watch=watch)
        rewards, figures = self._reward(answers, watch)
        grouped = rewards.reshape(-1, self._sampler.sampling.group_size)
        each = advantages(grouped, standardised=self._standardised).ravel()
        self._sampler.write(step, answers, {"reward": rewards, "advantage": each})
        figures["equal_groups"] = float(np.mean(np.ptp(grouped, axis=1) == 0))
        batch = self._sampler.batch(answers)
        column = np.zeros((len(batch.tokens), 1), np.float32)
        column[: len(each), 0] = each
        spread = np.repeat(column, batch.tokens.shape[1], axis=1)
        return batch._replace(advantages=spread), figures

    def evaluate(
        self,
        params: Params,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> Mapping[str, float]:
        """See `Rollouts`.

        So that memory stays bounded, only some answers exist at a time; of the others their
        figures are kept.
        """
        rows: dict[str, list[float]] = {}
        for first in range(0, len(demonstrations), _ANSWERED_TOGETHER):
            answers = self._sampler.answer(
                params,
                demonstrations[first : first + _ANSWERED_TOGETHER],
                program,
                temperature=0.0,
                seed=0,
                watch=watch,
            )
            rewards, figures = self._reward(answers, watch)
            for name, value in figures.items():
                rows.setdefault(name, []).append(value * len(rewards))
        return {name: sum(values) / len(demonstrations) for name, values in rows.items()}

    def _reward(self, answers: Answers, watch: Watch) -> tuple[np.ndarray, dict[str, float]]:
        """The reward of each answer, and figures of all."""
        count = len(answers.samples)
        done = SamplingProgress(count, count, answers.tokens)
        found = []
        for sample in answers.samples:
            watch(done)  # a reward function may take its time
            found.append(weighted_reward(self._rewards, sample))
        totals = np.asarray([total for total, _ in found], np.float64)
        figures = {"reward": float(totals.mean()), **answers.figures()}
        if len(self._rewards) > 1:
            for name, _, _ in self._rewards:
                figures[f"reward/{name}"] = float(np.mean([each[name] for _, each in found]))
        return totals, figures
