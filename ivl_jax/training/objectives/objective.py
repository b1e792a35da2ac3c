"""What an objective is: which per-token scores it needs, and how they become a loss.

Every file of this package defines an `Objective`, which `ivl_jax.training.loss` evaluates.

A loss is a sum over tokens of w · score, for one or several scores of
`ivl_jax.composed.token_scores`. The weights w are known before the gradient is taken: they come
from the batch or, if they depend on the model itself (a sigmoid of a whole answer's
log-probability, a clipped ratio), from a first pass that computes scores without a gradient. So
the gradient is taken while a chunk's logits exist, and no array of the vocabulary's size is stored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Float32

from ivl_jax.config import TrainConfig
from ivl_jax.data.batching import Batch

Scores = Mapping[str, Array]
"""Name → per-token scores [B T] of a micro-batch, float32 or bool."""
Weights = Mapping[str, Float32[Array, "B T"]]
"""Name of a score → its weight in the loss per token; 0 for a token that does not count."""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled from the model that is trained, in place of those of the rows."""

    table: str
    """The config table that these options come from, for messages."""
    max_new_tokens: int
    """The most tokens per answer."""
    temperature: float
    group_size: int = 1
    """Answers per prompt."""
    updates: int = 1
    """Optimizer steps per batch of answers; with more than one, batches hold the
    `sampled_log_probs`."""
    rewarded: bool = False
    """Whether batches hold the `advantages` of each answer over the others to its prompt."""
    mask_truncated: bool = False
    """Whether answers that reached `max_new_tokens` are left out of the loss."""


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss that is linear in per-token scores; equal only to itself."""

    name: str
    scores: tuple[str, ...]
    """The scores that the loss is linear in; differentiated."""
    weigh: Callable[[Batch, Scores], Weights]
    """(micro-batch, scores of the first pass) → the weight of each of `scores`, per token."""
    count: Callable[[Batch], Float32[Array, ""]]
    """Batch → the loss's denominator, applied once over the global batch; arrays [*A B T]."""
    sums: Callable[[Batch, Scores], Mapping[str, Float32[Array, ""]]]
    """(micro-batch, all scores) → named sums, which are added over micro-batches and batches."""
    figures: Mapping[str, tuple[str, str]]
    """Name of a figure → the sums whose quotient it is; figures whose sums are missing are left
    out. The sums `loss_tokens` and `real_tokens` always exist."""
    first_pass: tuple[str, ...] = ()
    """Scores that `weigh` reads, computed without a gradient before it is called; empty: no first
    pass."""
    monitored: tuple[str, ...] = ()
    """Further scores that `sums` reads, at every step."""
    evaluated: tuple[str, ...] = ()
    """Further scores that `sums` reads in evaluations with a base."""
    loss: Callable[[Batch, Scores], Float32[Array, ""]] | None = None
    """(micro-batch, all scores) → the sum that is reported as the loss, if Σ w · score has only its
    gradient, not its value; None: report Σ w · score."""
    dialogues: int = 1
    """Dialogues per row of the data: 2 for pairs of a chosen and a rejected answer, which lie next
    to each other in a row of the batch."""
    needs_reference: bool = False
    """Whether its scores compare with a frozen reference, the scores `base_…`: the base or, for a
    model that is trained alone, the model as it was before the run."""
    takes_augmentation: bool = False
    """Whether it may be trained with a varied base (`[augmentation]`): its scores do not compare
    with the base, and its answers are not sampled from what is trained."""
    needs_teacher: bool = False
    """Whether its scores compare with a teacher, which the config's `distil` table names."""
    temperature: float = 1.0
    """Of the distributions that its scores are of: logits are divided by it, the base's too."""
    sampling: Sampling | None = None
    """How the answers that it learns from are sampled; None: it learns from those of the rows."""
    best_by: str = "nll"
    """The figure of held-out evaluations that decides which checkpoint is the best."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Which value of that figure is the best."""
    shown: tuple[str, ...] = ("nll",)
    """Figures that the line of a step shows beside the loss."""
    configure: "Callable[[TrainConfig], Objective] | None" = None
    """Config of the run → the objective with the run's options; None: it has none."""

    @property
    def updates(self) -> int:
        """Optimizer steps per batch."""
        return 1 if self.sampling is None else self.sampling.updates
