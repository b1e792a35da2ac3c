"""The flags that every evaluation has: which models, and how dialogues are written for them.

In: the command line. Out: frozen dataclasses. Imports no JAX, so that `--help` stays fast.
"""

from dataclasses import dataclass, field
from typing import Literal

from ivl_jax.config import (
    ComposedModelConfig,
    ConfigError,
    RowsConfig,
    RuntimeConfig,
)
from ivl_jax.config.annotations import Inline


@dataclass(frozen=True)
class ModelFlags:
    """Which models are evaluated; without a value network, the base alone."""

    composed: Inline[ComposedModelConfig] = field(default_factory=ComposedModelConfig)
    chat_template: str = ""
    """Empty: the first value network's own, else the base's; or `llama-2`, `chatml`, `plain`, …"""
    runtime: Inline[RuntimeConfig] = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class LikelihoodFlags:
    """Held-out demonstrations: NLL, top-1, KL from the base, mean |z_value| by position."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    data: tuple[str, ...] = ()
    """JSON or JSONL files of demonstrations, or one `tfds:NAME[/CONFIG][:SPLIT]`."""
    output: str = ""
    """JSON file of the report; empty: only the table is shown."""
    rows: Inline[RowsConfig] = field(default_factory=RowsConfig)
    max_length: int = 1024
    """Tokens of a dialogue that are read; the context of the models where that is less."""
    limit: int = 0
    """Demonstrations that are read, always the same ones; 0: all."""
    batch_size: int = 8
    """Dialogues scored together."""
    data_dir: str = "data_cache"
    """Where the ArrayRecord form of the demonstrations is stored."""


@dataclass(frozen=True)
class Gsm8kFlags:
    """GSM8K as the paper's authors measure it: their prompt, greedy, the last number counts."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    data: str = ""
    """JSONL file of `question` and `answer` (`… #### N`)."""
    output: str = ""
    """JSONL file, one line an item, written as it goes; a second run continues where it stopped.
    The summary lies beside it, `.json` in place of `.jsonl`."""
    prompt: Literal["chat", "text"] = "chat"
    """`chat`: through the value network's chat template, as the authors do; `text`: bare."""
    max_new_tokens: int = 512
    """Tokens of an answer at most."""
    limit: int = 0
    """Items answered, the first ones; 0: all."""
    batch_size: int = 8
    """Items answered together."""


@dataclass(frozen=True)
class MtBenchFlags:
    """Answers to multi-turn questions, in FastChat's format; judging them stays outside."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    questions: str = ""
    """JSONL file of `question_id`, `category` and `turns`, as FastChat's `question.jsonl`."""
    output: str = ""
    """JSONL file of answers, one line a question; a second run continues where it stopped."""
    model_id: str = "ivl"
    """What the answers call the model."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    temperature: float | None = None
    """One for all questions; by default each category's own."""
    seed: int = 0
    """Seed of sampling; question and turn are folded in."""
    batch_size: int = 8
    """Questions answered together."""


@dataclass(frozen=True)
class ToxigenFlags:
    """Continuations of ToxiGen's prompts; classifying them stays outside."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    prompts: tuple[str, ...] = ()
    """Text files of one prompt a line, named `LABEL_GROUP….txt` as ToxiGen's are."""
    output: str = ""
    """JSONL file, one line a prompt, written as it goes; a second run continues."""
    prompt: Literal["chat", "text"] = "chat"
    """`chat`: "Complete the following: …" through the chat template, as the authors do; `text`:
    the prompt as it is."""
    per_group: int = 500
    """Prompts drawn from each file at most, by the seed; 0: all."""
    seed: int = 42
    """Seed of the draw."""
    max_new_tokens: int = 512
    """Tokens of a continuation at most."""
    batch_size: int = 8
    """Prompts continued together."""


def require(problems: list[str]) -> None:
    """Raise a ConfigError that lists the problems; pass where there are none."""
    if problems:
        raise ConfigError(
            "the evaluation cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )
