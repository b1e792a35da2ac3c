"""What the prose of the experiments' page can talk about: short names for measured compositions.

In: figures by the name of their measurement. Out: a lookup for `transfer.notes`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.matrix import Base, Measurement, Term, Training, on
from ivl_jax.experiments.transfer.notes import Lookup, NotesError
from ivl_jax.experiments.transfer.table import Table

_BASES: tuple[Base, ...] = ("S", "L", "L-continued", "X")
_KEYS = {"facts": "exact_match", "new_facts": "new_exact_match"}


def subjects() -> dict[str, tuple[Base, Callable[[int], Measurement]]]:
    """Name → base, and the measurement of each seed.

    `L`, `L+value`, `L+proxy`, `L-tuned` and the same of every base; the other trainings of a table
    as `cascade@L`, which is L with that value network.
    """
    found: dict[str, tuple[Base, Callable[[int], Measurement]]] = {}
    for base in _BASES:
        found[base] = base, lambda seed, base=base: Measurement(base)
        found[f"{base}-tuned"] = base, matrix.reference(base)
        found[f"{base}-tuned-by-facts"] = base, matrix.reference(base, "exact_match")
        found[f"{base}+value"] = base, matrix.value_on(base)
        found[f"{base}+proxy"] = base, matrix.proxy_on(base)
        found[f"{base}+proxy-by-facts"] = base, matrix.proxy_on(base, "exact_match")
        for name, make in _trainings().items():
            found[f"{name}@{base}"] = base, _with(make, base)
    for method in ("bytes", "dtw"):
        for centred in (False, True):

            def mapped(seed: int, method: Any = method, centred: bool = centred) -> Measurement:
                return Measurement("X", (Term(matrix.recipe(seed)),), method, centred)

            found[f"X+value-{method}{'-centred' if centred else ''}"] = "X", mapped
    return found


def _with(make: Callable[[int], Training], base: Base) -> Callable[[int], Measurement]:
    return lambda seed: on(base, Term(make(seed)))


def _trainings() -> dict[str, Callable[[int], Training]]:
    penalties = [f"{kind}-{weight:g}" for kind, weight in matrix.PENALTIES]
    return {
        "cascade": lambda seed: matrix.schemes(seed)[1],
        "cascade_no_text": lambda seed: matrix.schemes(seed)[2],
        "linear": lambda seed: matrix.schemes(seed)[3],
        "depths": lambda seed: matrix.schemes(seed)[4],
        "zeroed": lambda seed: matrix.initialisations(seed)[1],
        "random": lambda seed: matrix.initialisations(seed)[2],
        "two": lambda seed: matrix.base_choices(seed)[1],
        "large": matrix.large_value,
        **{
            name: lambda seed, at=at: matrix.penalties(seed)[at]
            for at, name in enumerate(penalties)
        },
    }


def make_lookup(figures: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> Lookup:
    """Make the lookup of the page's prose.

    Args:
        figures: Measurement's name → its record.
        seeds: Of the trainings.

    Returns:
        (subject, figure) → values by seed. Figures are those of the records (`facts` and
        `new_facts` are short for the shares answered), `ratio` (share of the fine-tuned base's gain
        in NLL), with the ends `ratio_low` and `ratio_high` of its interval over items, the same of
        one kind of question, `fact_ratio` and `docstring_ratio`, and `recalled` (facts answered as
        a share of what the base recalls). A subject that there is not is a `NotesError`.
    """
    known, table = subjects(), Table(figures, seeds)

    def lookup(subject: str, figure: str) -> tuple[float, ...]:
        if subject not in known:
            raise NotesError(f"{subject}: expected one of {', '.join(sorted(known))}")
        base, make = known[subject]
        if figure == "recalled":
            return table.recalled(base, make).values
        if figure in ("ratio_low", "ratio_high"):
            interval = table.ratio_interval(base, make)
            return () if interval is None else (interval[figure == "ratio_high"],)
        if figure.endswith("ratio"):
            return table.ratio(base, make, figure.removesuffix("ratio") + "nll").values
        return table.over_seeds(make, _KEYS.get(figure, figure)).values

    return lookup
