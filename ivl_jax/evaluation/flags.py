"""The flags that every evaluation has: the models and their chat template.

In: the command line. Out: frozen dataclasses. Does not import JAX, so that `--help` stays fast.
"""

from dataclasses import dataclass, field

from ivl_jax.config import (
    ComposedModelConfig,
    ConfigError,
    RuntimeConfig,
)
from ivl_jax.config.annotations import Inline


@dataclass(frozen=True)
class ModelFlags:
    """The models to evaluate; without a value network, the base alone."""

    composed: Inline[ComposedModelConfig] = field(default_factory=ComposedModelConfig)
    chat_template: str = ""
    """Empty: the first value network's own, else the base's; or `llama-2`, `chatml`, `plain`, …"""
    runtime: Inline[RuntimeConfig] = field(default_factory=RuntimeConfig)


def require(problems: list[str]) -> None:
    """Raise a ConfigError that lists the problems, if there are any."""
    if problems:
        raise ConfigError(
            "the evaluation cannot start:\n" + "\n".join(f"  - {line}" for line in problems)
        )
