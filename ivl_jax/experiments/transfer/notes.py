"""The prose of the experiments' page: its numbers come from the figures, its claims are checked.

In: a Markdown template, and figures by name. Out: Markdown. In the template

    {L+value.nll}            is the mean over seeds of L with the recipe's value network
    {L+value.facts:.0%}      in a format of its own
    {L+value.facts.max}      the largest over seeds; `.min` is the smallest
    {L.nll - L+value.nll}    a difference
    <!-- holds: L+value.nll < L+proxy.nll -->    a claim, left out of the page

so that a sentence whose numbers have changed says the new ones, and one whose comparison no longer
holds is an error.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Literal

Lookup = Callable[[str, str], tuple[float, ...]]
"""(subject, figure) → its value for each seed; empty: it has not been measured."""

_NUMBER = r"[\w+@.-]*[\w@]"
_PLACEHOLDER = re.compile(rf"\{{({_NUMBER})(?: - ({_NUMBER}))?(?::([^}}]*))?\}}")
_CLAIM = re.compile(r"[ \t]*<!-- holds: (.*?) -->")
_COMPARISON = re.compile(rf"({_NUMBER}) (<=|>=|<|>) ({_NUMBER})")
_OPERATORS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
_OVER_SEEDS: Mapping[str, Callable[[tuple[float, ...]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "min": min,
    "max": max,
}
_FORMS = {"nll": ".3f", "ratio": ".2f", "low": ".2f", "high": ".2f", "recalled": ".2f"}
_SHARE = ".1%"


class NotesError(ValueError):
    """Claims that the figures do not support, or numbers that there are not; names all of them."""


def fill_notes(template: str, lookup: Lookup, *, missing: Literal["error", "dash"]) -> str:
    """Fill in the numbers and check the claims.

    Args:
        template: Markdown with placeholders and claims.
        lookup: Gives the figures.
        missing: What a number that has not been measured becomes; with `dash`, claims about such
            numbers are not checked.

    Returns:
        Markdown.

    Raises:
        NotesError: A claim does not hold, or a number is missing.

    Example:
        >>> figures = {("L", "nll"): (4.0,), ("L+value", "nll"): (3.0, 3.5)}
        >>> text = "{L.nll:.1f}, then {L+value.nll}.<!-- holds: L+value.nll < L.nll -->"
        >>> fill_notes(text, lambda *name: figures[name], missing="error")
        '4.0, then 3.250.'
    """
    problems: dict[str, None] = {}

    def number(name: str) -> float | None:
        if re.fullmatch(r"\d+(\.\d+)?", name):
            return float(name)
        subject, figure, over = _split(name)
        values = lookup(subject, figure)
        if not values and missing == "error":
            problems[f"{name} has not been measured"] = None
        return _OVER_SEEDS[over](values) if values else None

    def fill(found: re.Match[str]) -> str:
        first, second, form = found.groups()
        numbers = [number(name) for name in (first, second) if name]
        if None in numbers:
            return "–"
        value = numbers[0] if second is None else numbers[0] - numbers[1]  # type: ignore[operator]
        return format(value, form or _form(_split(first)[1]))

    def check(found: re.Match[str]) -> str:
        for each in found[1].split(" and "):
            parts = _COMPARISON.fullmatch(each.strip())
            if parts is None:
                problems[f"holds: {each}: expected a comparison of two numbers"] = None
                continue
            left, right = number(parts[1]), number(parts[3])
            if left is None or right is None:
                continue
            if not _OPERATORS[parts[2]](left, right):
                problems[f"holds: {each}: no longer true, {left:.4g} and {right:.4g}"] = None
        return ""

    text = _PLACEHOLDER.sub(fill, _CLAIM.sub(check, template))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise NotesError(
            f"the experiments' notes do not fit the figures; change their sentences:\n{listed}"
        )
    return text


def _form(figure: str) -> str:
    """How a figure is shown: those that end alike, as `docstring_nll`, are shown alike."""
    return _FORMS.get(figure.rpartition("_")[2], _SHARE)


def _split(name: str) -> tuple[str, str, str]:
    """`L+value.facts.max` → subject, figure, how seeds are summarised."""
    parts = name.split(".")  # a subject may have a dot itself: l1-0.3@L
    over = parts.pop() if parts[-1] in _OVER_SEEDS else "mean"
    *subject, figure = parts
    if not subject or not figure:
        raise NotesError(f"{{{name}}}: expected SUBJECT.FIGURE or SUBJECT.FIGURE.min or .max")
    return ".".join(subject), figure, over
