"""How a prompt is continued: sampling, limits, and the strengths of the value networks.

In: values from a command line or a caller. Out: a frozen dataclass whose own checks have passed.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ivl_jax.config.annotations import NoFlag, Repeatable
from ivl_jax.config.checks import ConfigError, found
from ivl_jax.config.strength import StrengthPolicy

LARGEST_STRENGTH = 1e4
"""With value logits of 100 the product is 10⁶, where float32 has a spacing of 0.06: beyond that the
base's logits are lost to rounding."""
LARGEST_LOGIT_BIAS = 100
"""As in OpenAI's API: logits rarely differ by more, so that it bans a token or forces it."""
MOST_LOGIT_BIASES = 300
"""Tokens whose logits one request may change."""
_MOST_TOP_LOG_PROBS = 100
"""The device state has room for this many top log-probabilities per generated token."""


def strength_problem(alpha: float | int) -> str | None:
    """Say what is wrong with a strength; None if nothing is.

    Args:
        alpha: the given α.

    Example:
        >>> strength_problem(1e38)
        'must be between -10,000 and 10,000, got 1e+38'
    """
    try:
        finite = math.isfinite(alpha)
    except OverflowError:  # an integer too large for a float
        finite = True
    if not finite:
        return f"must be finite, got {alpha}"
    if abs(alpha) <= LARGEST_STRENGTH:
        return None
    return f"must be between {-LARGEST_STRENGTH:,.0f} and {LARGEST_STRENGTH:,.0f}, {found(alpha)}"


def logit_bias_problem(bias: Mapping[int, float | int]) -> str | None:
    """Say what is wrong with a logit bias; None if nothing is.

    Args:
        bias: numbers by token id.

    Example:
        >>> logit_bias_problem({5: -100, 7: 100.5})
        'must be between -100 and 100, got 100.5 for token 7'
    """
    if len(bias) > MOST_LOGIT_BIASES:
        return f"must name at most {MOST_LOGIT_BIASES} tokens, got {len(bias)}"
    most = LARGEST_LOGIT_BIAS
    for token_id, number in bias.items():
        if not -most <= number <= most:  # NaN included
            return f"must be between -{most} and {most}, {found(number)} for token {token_id}"
    return None


@dataclass(frozen=True)
class GenerationOptions:
    """How a prompt is continued."""

    max_new_tokens: int = 256
    """The most tokens to generate; fewer if the context is full before."""
    temperature: float = 0.0
    """0 is greedy: the arg-max, the lowest id among equal logits."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens with this total probability; 1: all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability; 0: none."""
    seed: int = 0
    """Seed of sampling; the prompt's index is folded in, then the token's index."""
    stop: Repeatable[Sequence[str]] = ()
    """String that ends the generation and is removed; repeat the flag for several."""
    stop_ids: NoFlag[Sequence[int]] = ()
    """Token ids that end the generation, in addition to the models' own."""
    strengths: NoFlag[Sequence[float] | None] = None
    """α of each value network; None: those of the composed model."""
    policy: NoFlag[StrengthPolicy | None] = None
    """How much of the strengths applies at each position; None: as the composed model says."""
    log_probs: NoFlag[int | None] = None
    """Log-probabilities (nats) of the generated tokens under the composed distribution, before
    logit bias, temperature, top-k, top-p and min-p. None: none; 0: of the tokens themselves; k:
    also of the k likeliest tokens at each place."""
    logit_bias: NoFlag[tuple[tuple[int, float | int], ...] | Mapping[int, float | int]] = ()
    """Numbers in [-100, 100] by token id, added to the composed logits before a token is chosen; at
    most 300. -100 bans a token, 100 forces it. Kept as pairs, for hashing."""

    def __post_init__(self) -> None:
        """Check types, then ranges, reporting all problems; lists become tuples, for hashing."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in _plain_values(given).items():
            object.__setattr__(self, name, value)
        checks = {
            "max_new_tokens must be ≥ 1": self.max_new_tokens >= 1,
            "temperature must be ≥ 0 and finite": 0 <= self.temperature < math.inf,
            "top_k must be in [0, 2³¹)": 0 <= self.top_k < 2**31,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "min_p must be in [0, 1)": 0 <= self.min_p < 1,
            "seed must be in [0, 2³²)": 0 <= self.seed < 2**32,
            "stop must hold strings that are not empty": all(self.stop),
            f"log_probs must be None or in [0, {_MOST_TOP_LOG_PROBS}]": self.log_probs is None
            or 0 <= self.log_probs <= _MOST_TOP_LOG_PROBS,
        }
        problems = [
            f"{rule}, {found(getattr(self, rule.split()[0]))}"
            for rule, ok in checks.items()
            if not ok
        ]
        problems += [
            f"strengths {problem}"
            for alpha in self.strengths or ()
            if (problem := strength_problem(alpha))
        ]
        if problem := logit_bias_problem(dict(self.logit_bias)):
            problems.append(f"logit_bias {problem}")
        if problems:
            raise ConfigError("generation options: " + "; ".join(problems))


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationOptions` as keywords of a call."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_ids: int | Sequence[int]
    strengths: float | Sequence[float] | None
    policy: StrengthPolicy | None
    log_probs: int | None
    logit_bias: Mapping[int, float | int]


def options_with(
    options: Any, keywords: Mapping[str, Any] | GenerationKeywords
) -> GenerationOptions:
    """Give options with some fields changed.

    Args:
        options: `GenerationOptions`, or a mapping of their fields.
        keywords: fields that take the place of theirs.

    Returns:
        The options.

    Raises:
        TypeError: neither of these, a field that does not exist, or a value of another kind.
        ConfigError: a value out of its range.

    Example:
        >>> options_with(GenerationOptions(seed=3), {"max_new_tokens": 5, "stop": "."}).stop
        ('.',)
    """
    if not isinstance(options, GenerationOptions | Mapping):
        raise TypeError(
            "options: expected GenerationOptions, or its fields as keywords such as "
            f"max_new_tokens=5, got {options!r}"
        )
    if isinstance(options, Mapping):
        options, keywords = GenerationOptions(), {**options, **keywords}
    for name in keywords:
        if name not in _KINDS:
            close = difflib.get_close_matches(name, _KINDS, n=1)
            raise TypeError(
                f"unknown generation option {name!r}"
                + (f"; did you mean {close[0]}?" if close else "")
                + f" Expected one of {', '.join(_KINDS)}"
            )
    return dataclasses.replace(options, **_plain_values(keywords))


def _plain_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields in their one form: Python's numbers, and tuples where there are several.

    One string, id or strength stands for a sequence of it.
    """
    values, problems = {}, []
    for name, value in given.items():
        kind = _KINDS[name]
        several = kind.several and isinstance(value, Iterable) and not isinstance(value, str)
        each = tuple(value) if several else (value,)
        if value is None and kind.optional:
            values[name] = None
        elif all(kind.fits(one) for one in each):
            plain = tuple(kind.convert(one) for one in each)
            values[name] = plain if kind.several else plain[0]
        else:
            more = ", or several" if kind.several else ""
            problems.append(f"{name} must be {kind.expected}{more}, got {value!r}")
    if problems:
        raise TypeError("generation options: " + "; ".join(problems))
    return values


@dataclass(frozen=True)
class _Kind:
    """What the value of a field may be."""

    expected: str
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any]
    several: bool = False
    optional: bool = False


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_logit_bias(value: Any) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | tuple | list) and all(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and _is_integer(pair[0])
        and _is_number(pair[1])
        for pair in pairs
    )


def _to_pairs(value: Any) -> tuple[tuple[int, float | int], ...]:
    return tuple(sorted((int(i), _to_float(number)) for i, number in dict(value).items()))


def _to_float(value: Any) -> float | int:
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds; its range is checked later
        return value


_INTEGER = _Kind("an integer", _is_integer, int)
_NUMBER = _Kind("a number", _is_number, _to_float)
_STRING = _Kind("a string", lambda value: isinstance(value, str), str)
_POLICY = _Kind(
    "a StrengthPolicy", lambda value: isinstance(value, StrengthPolicy), lambda value: value
)
_KINDS = {
    "max_new_tokens": _INTEGER,
    "temperature": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "seed": _INTEGER,
    "stop": dataclasses.replace(_STRING, several=True),
    "stop_ids": dataclasses.replace(_INTEGER, expected="a token id", several=True),
    "strengths": dataclasses.replace(_NUMBER, several=True, optional=True),
    "policy": dataclasses.replace(_POLICY, optional=True),
    "log_probs": dataclasses.replace(_INTEGER, optional=True),
    "logit_bias": _Kind("a mapping from token ids to numbers", _is_logit_bias, _to_pairs),
}
