"""Options of the objectives that have any, one dataclass each.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed.
"""

import math
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


@dataclass(frozen=True)
class DistilConfig:
    """With `objective = "distil"`: the teacher whose predictions are learned, and how."""

    teacher: str = ""
    """Hugging Face folder or hub id of the teacher, or of its base if it has value networks."""
    revision: str | None = None
    """Hub revision of the teacher; only for hub ids."""
    values: tuple[str, ...] = ()
    """Value folders that are added to the teacher's base; empty: the model is the teacher."""
    strengths: tuple[float, ...] = ()
    """α of each of them; empty: 1 each."""
    value_models: tuple[str, ...] = ()
    """Folders or hub ids of the models that LoRA values among them belong to, in any order; empty:
    where the value folders say."""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """`forward` is KL(teacher ‖ student), `reverse` KL(student ‖ teacher), `js` Jensen–Shannon."""
    tokens: Literal["answers", "all"] = "answers"
    """Where the two are compared: on the assistant's tokens, or on every token of the text."""
    answers: Literal["given", "sampled"] = "given"
    """Answers that the two are compared on: those of the rows, or the student's own, sampled anew
    for every step (on-policy)."""
    max_new_tokens: int = 128
    """The most tokens per sampled answer."""
    temperature: float = 1.0
    """Of sampling; the two are compared at temperature 1 in any case."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the teacher's frozen parameters are stored."""

    def __post_init__(self) -> None:
        """Check that strengths and value networks match."""
        require_numbers(self, "distil.")
        require(
            not self.strengths or len(self.strengths) == len(self.values),
            f"distil.strengths has {len(self.strengths)} numbers for {len(self.values)} value "
            "network(s) in distil.values: name one each, or none",
        )
        require(
            all(math.isfinite(strength) for strength in self.strengths),
            f"distil.strengths must be finite, got {self.strengths}",
        )
        require(
            bool(self.teacher) or not self.values,
            f"distil.values = {self.values} needs a base to be added to: name it as distil.teacher",
        )
        require(
            bool(self.values) or not self.value_models,
            f"distil.value_models = {self.value_models} are the models of LoRA values: name those "
            "as distil.values",
        )
        require(
            bool(self.teacher) or self.revision is None,
            f'distil.revision = "{self.revision}" is that of a teacher: name it as distil.teacher',
        )
        _require_sampling("distil", self.max_new_tokens, self.temperature)


@dataclass(frozen=True)
class GrpoConfig:
    """With `objective = "grpo"`: how answers are sampled, rewarded and compared."""

    rewards: tuple[str, ...] = ("exact_match",)
    """`exact_match`, `word_f1`, `gsm8k_number`, `contains`, `regex:PATTERN`, or
    `module:function` of your own; several are added up."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward; empty: 1 each."""
    group_size: int = 8
    """Answers per prompt; `step.batch_size` is a multiple of it."""
    max_new_tokens: int = 128
    """The most tokens per answer."""
    temperature: float = 1.0
    """Of sampling, and of the distribution that is learned: the loss divides all logits by it, the
    base's too. Decode at the same temperature."""
    advantage: Literal["standardised", "centred"] = "standardised"
    """A reward minus its group's mean, divided by the group's standard deviation (GRPO; 1e-4 is
    added to it) or not (Dr. GRPO)."""
    average: Literal["answers", "tokens", "constant"] = "answers"
    """Each answer counts the same (GRPO), or each token (DAPO); `constant` divides the sum over an
    answer's tokens by `max_new_tokens`, whatever its length (Dr. GRPO)."""
    kl_weight: float = 0.04
    """β: weight of the exact KL divergence from the base, per token."""
    mask_truncated: bool = True
    """Leave answers that reached `max_new_tokens` out of the loss."""
    updates: int = 1
    """Optimizer steps per batch of sampled answers; `step.max_steps` counts each of them."""
    clip_low: float = 0.2
    """ε: an answer that should become less likely pulls no further once the ratio of its token's
    probability to that at sampling is below 1 − ε; with `updates > 1`."""
    clip_high: float = 0.2
    """The same for likelier ones above 1 + ε; DAPO's is larger, 0.28."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "grpo.")
        require(bool(self.rewards), "grpo.rewards is empty: name at least one")
        require(
            not self.reward_weights or len(self.reward_weights) == len(self.rewards),
            f"grpo.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} "
            "reward(s) in grpo.rewards: name one each, or none",
        )
        require(
            all(math.isfinite(weight) for weight in self.reward_weights),
            f"grpo.reward_weights must be finite, got {self.reward_weights}",
        )
        require(
            self.group_size >= 2,
            f"grpo.group_size must be ≥ 2, got {self.group_size}: answers are compared",
        )
        _require_sampling("grpo", self.max_new_tokens, self.temperature)
        require(self.kl_weight >= 0, f"grpo.kl_weight must be ≥ 0, got {self.kl_weight}")
        require(self.updates >= 1, f"grpo.updates must be ≥ 1, got {self.updates}")
        require(
            0 < self.clip_low < 1, f"grpo.clip_low must be between 0 and 1, got {self.clip_low}"
        )
        require(self.clip_high > 0, f"grpo.clip_high must be > 0, got {self.clip_high}")


def _require_sampling(table: str, max_new_tokens: int, temperature: float) -> None:
    require(max_new_tokens >= 1, f"{table}.max_new_tokens must be ≥ 1, got {max_new_tokens}")
    require(temperature > 0, f"{table}.temperature must be > 0, got {temperature}")
