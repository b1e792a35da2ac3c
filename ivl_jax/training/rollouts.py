"""What a run needs from outside to learn from sampled answers.

Training does not decode, so whoever starts a run with an objective that samples hands in
`MakeRollouts`. In: the trained parameters and demonstrations, whose prompts are answered. Out: the
batch of a step, or held-out figures.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from ivl_jax.config import TrainConfig
from ivl_jax.data.batching import Batch
from ivl_jax.data.formats import Demonstration
from ivl_jax.model.decoder import Params
from ivl_jax.training.programs import BaseProgram
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.setup import Preparation
from ivl_jax.training.used_weights import UsedWeights


class SamplingStoppedError(Exception):
    """A signal ended sampling; the resumed run samples the same answers from the beginning."""


class SamplingProgress(NamedTuple):
    """How far the sampling of some answers has come."""

    answers: int
    """Answers that have ended."""
    asked: int
    """Answers in all."""
    tokens: int
    """Tokens sampled."""


Watch = Callable[[SamplingProgress], None]
"""Called after every step of the engine and after every reward; raises `SamplingStoppedError` to
end the sampling."""


@runtime_checkable
class Rollouts(Protocol):
    """Answers prompts with the model as it is at a step."""

    def batch(
        self,
        params: Params,
        step: int,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> tuple[Batch, Mapping[str, float]]:
        """Sample answers; the same step and parameters give the same ones.

        Args:
            params: of the trained model.
            step: steps taken.
            demonstrations: whose prompts are answered.
            program: of the base whose turn it is, which samples with the trained model.
            watch: is told how far sampling has come.

        Returns:
            NumPy arrays [B T], and figures of the answers.
        """
        ...

    def evaluate(
        self,
        params: Params,
        demonstrations: Sequence[Demonstration],
        program: BaseProgram,
        *,
        watch: Watch,
    ) -> Mapping[str, float]:
        """Answer held-out prompts greedily.

        Args:
            params: of the trained model.
            demonstrations: whose prompts are answered.
            program: of the base that answers with it.
            watch: is told how far answering has come.

        Returns:
            Figures of the answers; none if the objective has none.
        """
        ...


MakeRollouts = Callable[[TrainConfig, Preparation, UsedWeights, RunDirectory], Rollouts]
