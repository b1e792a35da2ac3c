"""The sections on what was varied: trainings, donors, maps, penalty and strength.

In: the matrix's figures. Out: Markdown, and the curves that are drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ivl_jax.experiments.estimate import ABSENT
from ivl_jax.experiments.page_sections import markdown
from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.matrix import (
    Base,
    Measurement,
    Term,
    Training,
    on,
    proxy_on,
    reference,
    value_on,
)
from ivl_jax.experiments.transfer.table import Table

_LARGER: Mapping[Base, float] = {"X": 2.9, "L": 9, "XL": 36}
"""Parameters of a target over those of S."""


def table_of(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of the rows in which anything has been measured."""
    return markdown(headings, [row for row in rows if set(row[1:]) != {ABSENT}])


def trainings_section(
    table: Table,
    title: str,
    make: Callable[[int], list[Training]],
    *,
    bases: Sequence[Base] = ("S", "L"),
    note: str = "",
) -> str:
    """A table of trainings that differ in one thing.

    Args:
        table: The figures.
        title: Of the section.
        make: Seed → the trainings.
        bases: Where the trained networks are added.
        note: Above the table.

    Returns:
        Markdown.
    """
    rows = []
    for index, training in enumerate(make(0)):
        row = [training.label]
        for base in bases:

            def at(seed: int, index: int = index, base: Base = base) -> Measurement:
                return on(base, Term(make(seed)[index]))

            row.append(table.over_seeds(at).show())
            if base != "S":
                row.append(table.ratio(base, at).show("{:.2f}"))
            row.append(table.over_seeds(at, "exact_match").show("{:.1%}"))
            if base == "L":
                row.append(table.over_seeds(at, "validation_nll").show())
        rows.append(row)
    headings = [""]
    for base in bases:
        headings.append(f"NLL on {base}")
        headings += [] if base == "S" else [f"ratio on {base}"]
        headings.append(f"facts on {base}")
        headings += [f"validation NLL on {base}"] if base == "L" else []
    return "\n\n".join(part for part in (f"## {title}", note, table_of(headings, rows)) if part)


def donor_size_section(table: Table) -> str:
    """What S gives to targets of several sizes."""
    rows = []
    for base, larger in _LARGER.items():
        known = table.one(Measurement(base), "recall")
        row = [f"{base}, 1 : {larger:g}"]
        row.append(ABSENT if known is None else f"{known:.1%}")
        for make in (value_on(base), proxy_on(base), proxy_on(base, "exact_match")):
            row.append(table.ratio(base, make).show("{:.2f}"))
            row.append(table.over_seeds(make, "exact_match").show("{:.1%}"))
        row.append(table.over_seeds(reference(base, "exact_match"), "exact_match").show("{:.1%}"))
        rows.append(row)
    headings = ["target, S : target", "recall", "ratio, value", "facts, value"]
    headings += ["ratio, proxy-tuning", "facts, proxy-tuning"]
    headings += ["ratio, proxy-tuning for facts", "facts, proxy-tuning for facts"]
    headings += ["facts, fine-tuned for facts"]
    return "## Size of the donor\n\n" + table_of(headings, rows)


def large_value_section(table: Table) -> str:
    """A value network as large as L, and how it carries back."""
    rows = []
    for label, training in (
        ("S", matrix.recipe),
        ("L (a value network of L's size)", matrix.large_value),
    ):
        row = [label]
        for base in ("S", "L"):

            def at(seed: int, base: Base = base, training: Any = training) -> Measurement:
                return on(base, Term(training(seed)))

            row += [table.over_seeds(at).show(), table.over_seeds(at, "exact_match").show("{:.1%}")]
        rows.append(row)
    headings = ["trained with", "NLL on S", "facts on S", "NLL on L", "facts on L"]
    return "## From large to small\n\n" + table_of(headings, rows)


def maps_section(table: Table) -> str:
    """Ways to map S's vocabulary to X's."""
    rows = []
    for method in ("bytes", "dtw"):
        for centred in (False, True):

            def at(seed: int, method: Any = method, centred: bool = centred) -> Measurement:
                return Measurement("X", (Term(matrix.recipe(seed)),), method, centred)

            rows.append(
                [
                    method,
                    "yes" if centred else "no",
                    table.over_seeds(at).show(),
                    table.ratio("X", at).show("{:.2f}"),
                    table.over_seeds(at, "exact_match").show("{:.1%}"),
                ]
            )
    headings = ["alignment", "centred", "NLL on X", "ratio", "facts"]
    return "## Vocabulary maps\n\n" + table_of(headings, rows)


def penalty_curves(table: Table) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Base → kind → (λ, mean NLL), ascending; λ = 0 is no penalty."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for base in ("S", "L"):
        for index, training in enumerate(matrix.penalties(0)):

            def at(seed: int, index: int = index, base: Base = base) -> Measurement:
                return on(base, Term(matrix.penalties(seed)[index]))

            found, (kind, weight) = table.over_seeds(at), training.penalty
            if found.values:
                for each in ("l1", "l2") if kind == "none" else (kind,):
                    points = curves.setdefault(base, {}).setdefault(each, [])
                    points.append((weight, found.mean))
    return {
        base: {kind: sorted(points) for kind, points in kinds.items()}
        for base, kinds in curves.items()
    }


def strength_curves(table: Table) -> dict[str, list[tuple[float, float]]]:
    """Base → (α, NLL), ascending; 0 is the base alone. One seed."""
    seed = table.seeds[0]
    curves = {}
    for base in ("S", "L"):
        points = [(0.0, table.one(Measurement(base)))]
        points += [
            (strength, table.one(on(base, Term(matrix.recipe(seed), strength))))
            for strength in (*matrix.STRENGTHS, 1.0)
        ]
        curves[base] = sorted((x, y) for x, y in points if y is not None)
    return curves
