"""Checks shared by all config dataclasses.

In: values of fields. Out: nothing, or a `ConfigError` that names the field.
"""

import dataclasses
import math
from typing import Any

_LARGEST_INTEGER = 2**63 - 1


class ConfigError(ValueError):
    """A configuration value that cannot be used: what, where, expected, found, remedy."""


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_numbers(config: Any, table: str = "") -> None:
    """Check that every number of a config dataclass is finite, and every integer fits 64 bits.

    Args:
        config: the dataclass.
        table: prefix of its fields in messages, such as `optimizer.`.

    Raises:
        ConfigError: names all fields whose number is not usable.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    problems = [
        f"{table}{name} {problem}"
        for name, value in fields.items()
        for number in (value if isinstance(value, tuple | list) else (value,))
        if (problem := number_problem(number))
    ]
    require(not problems, "; ".join(problems))


def number_problem(value: Any) -> str | None:
    """Say what is wrong with a number; None for a usable number or another type of value.

    Example:
        >>> number_problem(float("inf")), number_problem(1.5), number_problem("text")
        ('must be finite, got inf', None, None)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, got {value}"
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return f"must be an integer of at most 64 bits, {found(value)}"
    return None


def remote_problem(name: str, path: str | None) -> str | None:
    """Say that a path must be local; None for a local one.

    Example:
        >>> remote_problem("--output", "gs://b/out.jsonl")
        '--output gs://b/out.jsonl must be a local path: copy it afterwards (gcloud storage cp)'
    """
    if path is None or "://" not in path:
        return None
    return f"{name} {path} must be a local path: copy it afterwards (gcloud storage cp)"


def found(value: Any) -> str:
    """Say what was given; for an integer beyond 64 bits its size rather than its digits."""
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return f"got an integer of {value.bit_length()} bits"
    return f"got {value!r}"
