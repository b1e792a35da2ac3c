"""What the study of a real model may spend, stage by stage, and on what.

Out: `Budget`, whose fields are flags; `QUICK`, the smallest one that runs every stage. Times are of
two free CPU cores, about 180 GFLOP/s in all, and SmolLM2-135M.
"""

import dataclasses
from typing import Literal, get_args

from ivl_jax.config.checks import require, require_numbers

Stage = Literal[
    "sibling",
    "text",
    "healing",
    "value",
    "family_value",
    "donor_tuned",
    "target_lora",
    "target_full",
    "measure",
]
STAGES: tuple[Stage, ...] = get_args(Stage)

ABOUT: dict[Stage, str] = {
    "sibling": "the target's first and last layers as a model folder: seconds",
    "text": "dialogues that the target writes itself: 20 minutes",
    "healing": "the sibling learns to predict that text as the target does, and is the donor: "
    "1 hour",
    "value": "a value network beside the donor: 50 minutes",
    "family_value": "a value network beside S of the embedded family: minutes",
    "donor_tuned": "the donor fine-tuned, for proxy-tuning: 50 minutes",
    "target_lora": "the target fine-tuned by LoRA: 1.2 hours",
    "target_full": "the target fully fine-tuned: 1.5 hours",
    "measure": "NLL and exact match of every model that has been trained: 5 to 10 minutes each",
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything."""

    first_layers: int = 5
    """Layers of the donor from the target's beginning."""
    last_layers: int = 5
    """Layers of the donor from the target's end."""
    dialogues: int = 1500
    """Dialogues that the target writes; in half of them it also invents the question, in the others
    it answers one of the training demonstrations."""
    text_tokens: int = 200
    """The most tokens of each of their turns."""
    temperature: float = 0.9
    """At which they are sampled."""
    healing_tokens: int = 1_000_000
    """Tokens of the sibling's distillation, padding included, like the next three."""
    value_tokens: int = 1_000_000
    """Tokens of each value network's training."""
    tuning_tokens: int = 1_000_000
    """Tokens of each fine-tuning."""
    gsm8k_questions: int = 2000
    """Training questions of GSM8K."""
    docstring_questions: int = 1500
    """Training questions on docstrings."""
    held_out: int = 100
    """Test questions of each kind whose answers are scored."""
    answered: int = 100
    """Test questions of GSM8K that are answered, of those that are scored."""
    answer_tokens: int = 200
    """The most tokens of an answer."""
    length: int = 512
    """Tokens per row of a batch."""
    rows: int = 8
    """Rows per batch."""
    rank: int = 8
    """Of the target's adapter."""
    healing_rate: float = 5e-4
    """Learning rate of the distillation."""
    value_rate: float = 2e-4
    """Learning rate of the value network beside the donor."""
    tuning_rate: float = 5e-5
    """Learning rate of full fine-tuning."""
    lora_rate: float = 5e-4
    """Learning rate of the adapter."""
    penalty: float = 1.0
    """λ of the L1 penalty on value logits."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            flag = "--" + field.name.replace("_", "-")
            if field.name == "penalty":
                require(value >= 0, f"{flag} must be ≥ 0, got {value}")
            else:
                require(value > 0, f"{flag} must be > 0, got {value}")
        require(
            min(self.healing_tokens, self.value_tokens, self.tuning_tokens)
            >= self.rows * self.length,
            "--healing-tokens, --value-tokens and --tuning-tokens must each be at least one batch, "
            f"{self.rows} rows of {self.length} = {self.rows * self.length:,} tokens; got "
            f"{self.healing_tokens:,}, {self.value_tokens:,} and {self.tuning_tokens:,}",
        )

    def steps(self, tokens: int) -> int:
        """Optimizer steps that read so many tokens.

        >>> Budget(rows=8, length=512).steps(1_000_000)
        244
        """
        return tokens // (self.rows * self.length)


QUICK = Budget(
    dialogues=8,
    text_tokens=24,
    healing_tokens=1024,
    value_tokens=1024,
    tuning_tokens=1024,
    gsm8k_questions=16,
    docstring_questions=16,
    held_out=4,
    answered=2,
    answer_tokens=24,
    length=256,
    rows=2,
    rank=4,
)
"""Every stage in two steps: at most 10 minutes in all."""


def quick(budget: Budget) -> Budget:
    """The quick budget, but for what was asked for.

    >>> found = quick(Budget(rank=16))
    >>> found.rank, found.rows
    (16, 2)
    """
    default = Budget()
    asked = {
        field.name: value
        for field in dataclasses.fields(budget)
        if (value := getattr(budget, field.name)) != getattr(default, field.name)
    }
    return dataclasses.replace(QUICK, **asked)
