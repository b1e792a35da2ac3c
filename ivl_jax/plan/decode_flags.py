"""The flags of a plan of decoding: those of infer.py's models, and the size of a batch.

In: the command line, with the config of a training run or without. Out: `DecodeConfig`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from ivl_jax.config import ComposedModelConfig, ConfigError, TrainConfig, load_config
from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import require, require_numbers
from ivl_jax.config.model import model_problems


@dataclass(frozen=True)
class DecodeConfig:
    """What is decoded."""

    model: Inline[ComposedModelConfig] = field(default_factory=ComposedModelConfig)
    batch: int = 1
    """Rows decoded together."""
    context: int = 2048
    """Tokens per row, its prompt included; prompts are planned to be as long."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self)
        require(self.batch >= 1, f"--batch must be ≥ 1, got {self.batch}")
        require(self.context >= 1, f"--context must be ≥ 1, got {self.context}")


def read_decode_flags(
    arguments: Sequence[str], *, program: str, description: str
) -> tuple[DecodeConfig, TrainConfig | None]:
    """Read `--config`, if given, then the flags.

    Args:
        arguments: without the program's name.
        program: what the user called.
        description: the first paragraphs of the help.

    Returns:
        The flags, and the training run of `--config`: its base and compute dtype are the flags'
        defaults, and its value network is meant where no `--value` is given.

    Raises:
        SystemExit: after `--help`, or if the flags cannot be parsed (status 2).
        ConfigError: a file or a flag with a value that is not allowed.
    """
    # Imported here: tyro takes a while.
    from ivl_jax.command_line.flags import parse_flags

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    chosen, rest = parser.parse_known_args(list(arguments))
    run = None if chosen.config is None else load_config(chosen.config)
    default = DecodeConfig()
    if run is not None:
        base = run.all_bases[0].path if run.method == "value" else run.base.path
        default = DecodeConfig(ComposedModelConfig(base=base, dtype=run.step.compute_dtype))
    text = description.replace("{program}", program)
    return parse_flags(DecodeConfig, rest, prog=program, description=text, default=default), run


def check_decode_flags(config: DecodeConfig, run: TrainConfig | None) -> None:
    """Check that the flags are complete and supported.

    Args:
        config: the flags.
        run: the training run, if one was named.

    Raises:
        ConfigError: flags are missing or not supported; lists all of them.
    """
    model = config.model
    problems = model_problems(model)
    if not model.value and (run is None or run.method != "value"):
        problems.append(
            "--value is missing: name a value folder or a language model, or none for the base "
            "alone; or give --config with a run that trains a value network"
        )
    if model.draft:
        problems.append("--draft is not planned: plan without it")
    if any(path != "none" for path in model.map):
        problems.append("--map is not planned: plan with a value of the base's vocabulary")
    if problems:
        lines = "\n".join(f"  - {line}" for line in problems)
        raise ConfigError(f"decoding cannot be planned:\n{lines}")
