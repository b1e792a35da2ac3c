"""Parameters of a rotary position embedding, and which of them each type uses.

In: fields. Out: `RopeParameters`, checked.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

ROPE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
        ),
    }
)
"""Supported type → its parameters besides `rope_theta` and `partial_rotary_factor`."""


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding of one layer type; names as in Hugging Face's `rope_parameters`.

    Raises:
        ValueError: An invalid value, or one that its `rope_type` does not use.
    """

    rope_theta: float
    """Base of the geometric series of wavelengths."""
    rope_type: str = "default"
    """`default`; `linear`: all frequencies are divided by `factor`; `llama3`, `yarn`: only the low
    ones."""
    factor: float = 1.0
    """Divisor of the scaled frequencies; 1 with `default`."""
    low_freq_factor: float | None = None
    """`llama3`: frequencies of at most this many turns in the original context are divided."""
    high_freq_factor: float | None = None
    """`llama3`: frequencies of at least this many turns in it are unchanged."""
    original_max_position_embeddings: int | None = None
    """`llama3` and `yarn`: the original context, in tokens."""
    attention_factor: float | None = None
    """`yarn`: factor of rotated queries and keys."""
    beta_fast: float | None = None
    """`yarn`: frequencies of at least this many turns in the original context are unchanged."""
    beta_slow: float | None = None
    """`yarn`: frequencies of at most this many turns in it are divided."""
    truncate: bool | None = None
    """`yarn`: whether the ends of the range in between are rounded to whole pairs."""
    partial_rotary_factor: float = 1.0
    """The share of each head that is rotated, from its first element; the rest is not."""

    def __post_init__(self):
        if self.rope_type not in ROPE_KEYS:
            raise ValueError(
                f"RopeParameters: rope_type: got {self.rope_type!r}, "
                f"supported: {', '.join(ROPE_KEYS)}"
            )
        keys, problems = ROPE_KEYS[self.rope_type], []
        for field in dataclasses.fields(self)[2:-1]:
            value = getattr(self, field.name)
            if field.name not in keys and value != field.default:
                problems.append(
                    f"{field.name}: got {value}, but rope_type {self.rope_type!r} does not use it"
                )
            elif field.name in keys and not _in_range(field.name, value):
                expected = "true or false" if field.name == "truncate" else "a positive number"
                problems.append(f"{field.name}: got {value}, expected {expected}")
        least = 1 if self.rope_type == "yarn" else 0  # which divides by its logarithm
        if not _in_range("rope_theta", self.rope_theta) or self.rope_theta <= least:
            problems.append(f"rope_theta: got {self.rope_theta}, expected a number over {least}")
        if not 0 < self.partial_rotary_factor <= 1:
            problems.append(
                f"partial_rotary_factor: got {self.partial_rotary_factor}, expected 0 < it ≤ 1"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if low in keys and not problems and not getattr(self, low) < getattr(self, high):
                problems.append(
                    f"expected 0 < {low} < {high}, got {getattr(self, low)}, {getattr(self, high)}"
                )
        if problems:
            raise ValueError("RopeParameters:\n  " + "\n  ".join(problems))

    def rotated_width(self, head_dim: int) -> int:
        """How many of a head's first elements are rotated."""
        return int(head_dim * self.partial_rotary_factor)


def _in_range(name: str, value: int | float | None) -> bool:
    if name == "truncate":
        return isinstance(value, bool)
    return value is not None and math.isfinite(value) and value > 0
