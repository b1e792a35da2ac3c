"""The flags of infer.py: a composed model, prompts, and how they are continued.

In: the command line. Out: a frozen dataclass whose own checks have passed.
"""

from dataclasses import dataclass, field

from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import ConfigError, remote_problem, require, require_numbers
from ivl_jax.config.generation import GenerationOptions
from ivl_jax.config.model import ComposedModelConfig, RuntimeConfig, model_problems
from ivl_jax.config.processes import ProcessesConfig


@dataclass(frozen=True)
class InferConfig:
    """Decode with a base model and, unless `--value none`, value networks on top."""

    model: Inline[ComposedModelConfig] = field(default_factory=ComposedModelConfig)
    prompt: str | None = None
    """One prompt; "" starts from the beginning-of-sequence token."""
    input: str | None = None
    """JSONL file with one {"prompt": …} or {"messages": […]} per line, optionally with its own
    "strengths": […], one per value; needs --output."""
    output: str | None = None
    """JSONL file, written line by line; a second run resumes where the first stopped."""
    chat: bool = False
    """Treat prompts as user messages in the first value's template; without a prompt, chat: each
    line of standard input is a message."""
    generation: Inline[GenerationOptions] = field(default_factory=GenerationOptions)
    batch_size: int = 8
    """Prompts decoded together, with --input; when one ends, the next takes its place."""
    runtime: Inline[RuntimeConfig] = field(default_factory=RuntimeConfig)
    distributed: bool = False
    """Several processes, on one or more hosts, compute as one; the first one writes."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    profile: str = ""
    """Write a trace of the third to seventh step, each of up to 16 tokens per row (4 for a single
    prompt), to this folder, for TensorBoard or xprof."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self)
        require(self.batch_size >= 1, f"--batch-size must be ≥ 1, got {self.batch_size}")


def check_infer_config(config: InferConfig) -> None:
    """Check that the flags are complete and consistent.

    Args:
        config: the flags.

    Raises:
        ConfigError: flags are missing or conflict; lists all of them.
    """
    problems = model_problems(config.model)
    if not config.model.value:
        problems.append("--value is missing: name a value folder, or none for the base alone")
    if config.prompt is not None and config.input is not None:
        problems.append("--prompt and --input cannot be combined: remove one")
    if config.prompt is None and config.input is None and not config.chat:
        problems.append("nothing to decode: give --prompt, --input with --output, or --chat")
    if config.distributed and config.prompt is None and config.input is None:
        problems.append(
            "--distributed needs --prompt or --input: only one process can read messages"
        )
    if (config.input is None) != (config.output is None):
        problems.append("--input and --output must be used together: give both or neither")
    if config.input is not None and config.input == config.output:
        problems.append(f"--input and --output are the same file, {config.input}: name another")
    if config.input is not None and "://" in config.input:
        problems.append(f"--input {config.input} must be a local path: copy it first")
    for name in ("output", "profile"):
        problem = remote_problem(f"--{name}", getattr(config, name))
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(
            "decoding cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )
