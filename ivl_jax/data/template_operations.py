"""The operations of chat templates that can make large values from small ones, checked in advance.

In: an operator, filter or method with its operands. Out: an error if its result would be larger
than the rendering's budget allows; otherwise the result, charged.
"""

import functools
import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import filters, tests

from ivl_jax.data.template_budget import Budget, TemplateLimitError, current_budget

# Not among Jinja's filters here: random ones would give different text in training and decoding,
# and chat templates need no links, HTML attributes or wrapped lines, whose regexes are slow.
LEFT_OUT = ("lipsum", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_SIZED_METHODS = frozenset(
    [
        "center",
        "expandtabs",
        "join",
        "ljust",
        "lstrip",
        "replace",
        "rjust",
        "rstrip",
        "strip",
        "zfill",
    ]
)
_STRIPPED_CHARACTERS = 1_000  # searched for every character of the text
_FORMAT = re.compile(r"%(?:\([^)]*\))?([^a-zA-Z%]*)[a-zA-Z%]")


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Checks `left operator right`; only `+`, `*`, `**` and `%` can make large values."""
    if isinstance(left, str) and operator == "%":
        _check_percent(budget, left, right if isinstance(right, tuple) else (right,))
    elif isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            budget.allow_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and abs(left) > 1:
            budget.allow_bits(left.bit_length() * max(right, 0))
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                budget.allow(len(sequence) * count)
    elif operator == "+" and isinstance(left, str | list | tuple) and type(left) is type(right):
        budget.allow(len(left) + len(right))


def check_method(
    budget: Budget, owner: Any, name: str, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Checks a call of one of Python's own methods; returns the arguments to call it with."""
    if name not in _SIZED_METHODS or not isinstance(owner, str) or not arguments:
        return arguments
    first = arguments[0]
    if name == "join":
        items = list(first)  # an iterator could be endless
        budget.allow(budget.measure(items) + len(owner) * len(items))
        return (items, *arguments[1:])
    if name == "replace":
        _check_replace(budget, owner, *arguments)
    elif "strip" in name:
        _check_stripped(first)
    elif isinstance(first, int):
        budget.allow(len(owner) * max(first, 1) if name == "expandtabs" else first)
    return arguments


def check_text_format(
    budget: Budget, text: str, arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    """Checks `text.format(…)`."""
    widths = count = 0
    for _, field, spec, _ in string.Formatter().parse(text):
        count += field is not None
        if spec and "{" in spec:
            raise TemplateLimitError("formats a text with a width that it computes")
        widths += sum(int(digits) for digits in re.findall(r"\d{1,9}", spec or ""))
    largest = budget.measure(list(arguments)) + budget.measure(dict(named))
    budget.allow(len(text) + widths + count * largest)


@functools.cache
def bounded_filters() -> dict[str, Callable[..., Any]]:
    """Returns Jinja's filters, each checked before and charged after the call."""
    kept = {name: used for name, used in filters.FILTERS.items() if name not in LEFT_OUT}
    return {name: _bounded(used, _CHECKS.get(name)) for name, used in kept.items()} | {
        "join": _bounded(_join, None),
        "tojson": _bounded(_to_json, None),
    }


@functools.cache
def bounded_tests() -> dict[str, Callable[..., Any]]:
    """Returns Jinja's tests, each charged as a step."""
    return {name: _bounded(used, None) for name, used in tests.TESTS.items()}


def _bounded(function: Callable[..., Any], check: Callable[..., None] | None) -> Callable[..., Any]:
    """A filter or test that is charged for; Jinja passes some of them its context first."""
    context_first = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def bounded(*arguments: Any, **named: Any) -> Any:
        budget = current_budget()
        budget.spend()
        if check is not None:
            check(budget, *arguments[context_first:], **named)
        result = function(*arguments, **named)
        budget.measure(result)
        return result

    return bounded


@filters.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    """Jinja's `join`, of items that are known to fit."""
    budget, items = current_budget(), list(value)
    budget.allow(budget.measure(items) + len(items) * len(str(d)))
    return filters.FILTERS["join"](context, items, d, attribute)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as written by transformers' `tojson` filter, stopped when it becomes too long."""
    budget = current_budget()
    if isinstance(indent, int | str):
        budget.allow(indent if isinstance(indent, int) else len(indent))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces, length = [], 0
    for piece in encoder.iterencode(x):
        length += len(piece)
        budget.spend()
        budget.allow(length)
        pieces.append(piece)
    return "".join(pieces)


def _check_percent(budget: Budget, text: str, arguments: tuple[Any, ...]) -> None:
    """Checks `text % arguments`."""
    if len(arguments) == 1 and isinstance(arguments[0], dict):
        arguments = tuple(arguments[0].values())
    specs = _FORMAT.findall(text)
    widths = sum(int(digits) for spec in specs for digits in re.findall(r"\d{1,9}", spec))
    if any("*" in spec for spec in specs):
        widths += sum(abs(item) for item in arguments if isinstance(item, int))
    largest = sum(budget.measure(item) for item in arguments)
    budget.allow(len(text) + widths + len(specs) * largest)


def _check_format(budget: Budget, value: Any, *arguments: Any, **named: Any) -> None:
    _check_percent(budget, str(value), tuple(named.values()) if named else arguments)


def _check_replace(budget: Budget, value: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    text, old, new = str(value), str(old), str(new)
    places = text.count(old) if old else len(text) + 1
    budget.allow(len(text) + places * max(len(new) - len(old), 0))


def _check_width(budget: Budget, value: Any, width: int = 80) -> None:
    budget.allow(width)


def _check_indent(
    budget: Budget, s: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> None:
    text = str(s)
    each = width if isinstance(width, int) else len(str(width))
    budget.allow(len(text) + each * (text.count("\n") + 1))


def _check_count(budget: Budget, value: Any, count: int, *_: Any, **__: Any) -> None:
    budget.allow(count)


def _check_round(budget: Budget, value: Any, precision: int = 0, *_: Any, **__: Any) -> None:
    if abs(precision) > 300:
        raise TemplateLimitError(f"rounds to {precision} places")


def _check_sum(budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateLimitError("sums values that are not numbers")  # lists take quadratic time


def _check_trim(budget: Budget, value: Any, chars: Any = None) -> None:
    _check_stripped(chars)


def _check_stripped(characters: Any) -> None:
    if isinstance(characters, str) and len(characters) > _STRIPPED_CHARACTERS:
        raise TemplateLimitError(f"strips more than {_STRIPPED_CHARACTERS:,} kinds of characters")


_CHECKS: Mapping[str, Callable[..., None]] = {
    "batch": _check_count,
    "center": _check_width,
    "format": _check_format,
    "indent": _check_indent,
    "replace": _check_replace,
    "round": _check_round,
    "slice": _check_count,
    "sum": _check_sum,
    "trim": _check_trim,
}
