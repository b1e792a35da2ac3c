"""Options of the objectives that have any, one dataclass each.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed.
"""

from dataclasses import dataclass
from typing import Literal

from ivl_jax.config.checks import require, require_numbers


@dataclass(frozen=True)
class PreferenceConfig:
    """With `objective = "dpo"`: how strongly the chosen answer is preferred to the rejected."""

    beta: float = 0.1
    """β: how much a difference of log-ratios counts; a larger one stays closer to the base."""
    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    """`sigmoid` is DPO, −log σ(β h); `ipo` is (h − 1/(2β))², h averaged over tokens; `kto` judges
    each answer by itself against the divergence from the base."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be swapped; with `sigmoid` only."""
    sft_weight: float = 0.0
    """Weight of the cross-entropy of the chosen answers, added to the loss."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "preference.")
        require(self.beta > 0, f"preference.beta must be > 0, got {self.beta}")
        require(
            0 <= self.label_smoothing < 0.5,
            f"preference.label_smoothing must be in [0, 0.5), got {self.label_smoothing}",
        )
        require(
            self.loss == "sigmoid" or not self.label_smoothing,
            f"preference.label_smoothing = {self.label_smoothing} cannot be combined with "
            f'preference.loss = "{self.loss}"',
        )
        require(self.sft_weight >= 0, f"preference.sft_weight must be ≥ 0, got {self.sft_weight}")
