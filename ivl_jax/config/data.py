"""Demonstrations: where they are, their row format, and how they become batches.

In: values from a TOML file or the command line. Out: frozen dataclasses whose own checks have
passed.
"""

from dataclasses import dataclass, field

from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import require, require_numbers


@dataclass(frozen=True)
class RowsConfig:
    """How the rows of a file of demonstrations are read."""

    format: str = "messages"
    """Row format: `sharegpt`, `messages`, `alpaca`, `prompt_completion` or `fields`, which reads
    `user_template` and `assistant_template`; of preferences `preference` or `hh`. Or
    `module:attribute` of a format of your own."""
    user_template: str = ""
    """With `format = "fields"`: the user's message, for example `{question}`."""
    assistant_template: str = ""
    """With `format = "fields"`: the assistant's message, for example `{answer}`."""
    max_malformed_fraction: float = 0.01
    """A larger share of malformed rows is an error."""

    def __post_init__(self) -> None:
        """Check the share; what a format needs is checked where formats are read."""
        require_numbers(self)
        require(
            0 <= self.max_malformed_fraction <= 1,
            f"max_malformed_fraction must be in [0, 1], got {self.max_malformed_fraction}",
        )

    @property
    def templates(self) -> dict[str, str]:
        """Role → template, for those that are given."""
        given = {"user": self.user_template, "assistant": self.assistant_template}
        return {role: template for role, template in given.items() if template}


@dataclass(frozen=True)
class DataConfig:
    """Demonstrations: where they are, their row format, and how they become batches."""

    train: tuple[str, ...] = ()
    """JSON or JSONL files, or one `tfds:NAME[/CONFIG][:SPLIT]`."""
    validation: tuple[str, ...] = ()
    """Held-out files or `tfds:` split; empty: `validation_fraction` of `train` is held out."""
    validation_fraction: float = 0.02
    """Share of `train` held out when `validation` is empty (paper: 2 %)."""
    group_field: str | None = None
    """Rows with equal values of this field stay in the same split."""
    rows: Inline[RowsConfig] = field(default_factory=RowsConfig)
    data_dir: str = "data_cache"
    """Where the ArrayRecord form of the demonstrations is stored."""
    chat_template: str = "auto"
    """`auto`: the tokenizer's own; or `llama-2`, `llama-3`, `chatml`, `vicuna`, `plain`."""
    max_length: int = 1024
    """Tokens per row of a batch; longer dialogues are truncated, counted and reported."""
    beyond_context: bool = False
    """Allow rows longer than a model's context (the paper trains TinyLlama, made for 2,048 tokens,
    at 4,096); a warning names the models instead of an error."""
    packing: bool = True
    """Put several demonstrations into one row; they never attend to each other."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "data.")
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}",
        )
        require(self.max_length >= 2, f"data.max_length must be at least 2, got {self.max_length}")
