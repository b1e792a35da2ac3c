"""Every flag of `python -m ivl_jax.evaluation`, with its default, its help text and its checks.

In: the command line. Out: frozen dataclasses. Imports no JAX, so that `--help` stays fast.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ivl_jax.config import ConfigError, DemonstrationFormat, DType, LayoutName, MeshConfig


@dataclass(frozen=True)
class ModelFlags:
    """Which models, composed how: z = z_base + Σ α · M(z_value)."""

    base: str = ""
    """Hugging Face folder or hub id of the base model."""
    value: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Value folder, or a language model in its place; repeat the flag for several. Without it, or
    with `none`: the base alone."""
    strength: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """α of each value in their order; default 1."""
    map: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Vocabulary map of a value with another tokenizer than the base's, built by
    `python -m ivl_jax.vocabulary build`; one a value in their order, `none` for those without."""
    chat_template: str = ""
    """Empty: the first value network's own, else the base's; or `llama-2`, `chatml`, `plain`, …"""
    dtype: DType = "float32"
    """Parameters and computation; logits are always composed in float32."""
    int8_base: bool = False
    """Round the base's kernels to int8: a quarter of their float32 memory, and faster on CPU."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(fsdp=1, tensor=-1))
    base_layout: LayoutName = "full"
    """How the base's parameters are split on the mesh."""
    value_layout: LayoutName = "full"
    """The same for the value networks."""


# Flags of the model stand beside a benchmark's own: --base, not --model.base.
Model = Annotated[ModelFlags, tyro.conf.arg(name="", prefix_name=False)]


@dataclass(frozen=True)
class LikelihoodFlags:
    """Held-out demonstrations: NLL, top-1, KL from the base, mean |z_value| by position."""

    model: Model = field(default_factory=ModelFlags)
    data: tuple[str, ...] = ()
    """JSON or JSONL files of demonstrations, or one `tfds:NAME[/CONFIG][:SPLIT]`."""
    output: str = ""
    """JSON file of the report; empty: only the table is shown."""
    format: DemonstrationFormat = "messages"
    """Row format; `fields` reads `user_template` and `assistant_template`."""
    user_template: str = ""
    """With `--format fields`: the user's message, for example `{question}`."""
    assistant_template: str = ""
    """With `--format fields`: the assistant's message, for example `{answer}`."""
    max_length: int = 1024
    """Tokens of a dialogue that are read; the context of the models where that is less."""
    limit: int = 0
    """Demonstrations that are read, always the same ones; 0: all."""
    batch_size: int = 8
    """Dialogues scored together."""
    data_dir: str = "data_cache"
    """Where the ArrayRecord form of the demonstrations is stored."""
    max_malformed_fraction: float = 0.01
    """A larger share of malformed rows is an error."""


@dataclass(frozen=True)
class Gsm8kFlags:
    """GSM8K as the paper's authors measure it: their prompt, greedy, the last number counts."""

    model: Model = field(default_factory=ModelFlags)
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

    model: Model = field(default_factory=ModelFlags)
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

    model: Model = field(default_factory=ModelFlags)
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


def check_model_flags(flags: ModelFlags) -> list[str]:
    """Say what is wrong with the flags that choose the models; a phrase each."""
    problems = []
    if not flags.base:
        problems.append("--base is missing: name a Hugging Face folder or hub id")
    values = [value for value in flags.value if value != "none"]
    if "none" in flags.value and values:
        problems.append(
            f"--value none is the base alone, and --value {values[0]} is not: remove one"
        )
    if strange := [alpha for alpha in flags.strength if not math.isfinite(alpha)]:
        problems.append(f"--strength must be finite, got {', '.join(map(str, strange))}")
    for name, given in (("strength", flags.strength), ("map", flags.map)):
        if given and len(given) != len(values):
            problems.append(
                f"{len(values)} value(s), but --{name} is given {len(given)} time(s): give it once "
                "for each --value, in the same order, or not at all"
            )
    return problems


def require(problems: list[str]) -> None:
    """Raise a ConfigError that lists the problems; pass where there are none."""
    if problems:
        raise ConfigError(
            "the evaluation cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )
