"""The flags that every evaluation has: the models and their chat template.

In: the command line. Out: frozen dataclasses. Does not import JAX, so that `--help` stays fast.
"""

from dataclasses import dataclass, field
from typing import Any

from ivl_jax.config import (
    ComposedModelConfig,
    ConfigError,
    RuntimeConfig,
)
from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import require_numbers


@dataclass(frozen=True)
class ModelFlags:
    """The models to evaluate; without a value network, the base alone."""

    composed: Inline[ComposedModelConfig] = field(default_factory=ComposedModelConfig)
    chat_template: str = ""
    """Empty: the first value network's own, else the base's; or `llama-2`, `chatml`, `plain`, …"""
    runtime: Inline[RuntimeConfig] = field(default_factory=RuntimeConfig)


def check_reading(flags: Any) -> None:
    """Check the numbers of an evaluation that reads demonstrations.

    Args:
        flags: a dataclass with `batch_size`, `max_length` and `limit`.

    Raises:
        ConfigError: one of them is out of range.
    """
    require_numbers(flags)
    least = {"batch_size": 1, "max_length": 1, "limit": 0}
    problems = [
        f"--{name.replace('_', '-')} must be ≥ {smallest}, got {getattr(flags, name)}"
        for name, smallest in least.items()
        if getattr(flags, name) < smallest
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def require(problems: list[str]) -> None:
    """Raise a ConfigError that lists the problems, if there are any."""
    if problems:
        raise ConfigError(
            "the evaluation cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )
