"""The report on the matrix: one Markdown page with tables and plots.

In: figures by the name of their measurement. Out: `experiments.md` and its PNGs.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivl_jax.experiments.baselines.report import update_page as update_baselines
from ivl_jax.experiments.finetune.plan import MODELS
from ivl_jax.experiments.finetune.references import read_reference
from ivl_jax.experiments.finetune.report import references_section
from ivl_jax.experiments.finetune_sweep import RECORD as SWEEP_RECORD
from ivl_jax.experiments.lifts.report import update_page as update_lifts
from ivl_jax.experiments.page_sections import markdown
from ivl_jax.experiments.post_training.report import update_page as update_post_training
from ivl_jax.experiments.real.report import update_real_section
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
from ivl_jax.experiments.transfer.notes import fill_notes
from ivl_jax.experiments.transfer.plots import plot_penalties, plot_strengths, plot_transfer
from ivl_jax.experiments.transfer.subjects import make_lookup

Figures = Mapping[str, Mapping[str, Any]]
_ABSENT = "–"
_TARGETS: tuple[Base, ...] = ("L", "L-continued", "X")
_LARGER: Mapping[Base, float] = {"X": 2.9, "L": 9, "XL": 36}
"""Parameters of a target over those of S."""


class Spread(NamedTuple):
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    def show(self, form: str = "{:.3f}") -> str:
        """The mean, and with several seeds half the range."""
        if not self.values:
            return _ABSENT
        shown = form.format(self.mean)
        if len(self.values) == 1:
            return shown
        half = (max(self.values) - min(self.values)) / 2
        return f"{shown} ± {form.format(half)}"


class Table:
    """Looks figures up and summarises them over seeds."""

    def __init__(self, figures: Figures, seeds: Sequence[int]) -> None:
        self._figures = figures
        self._seeds = seeds

    def spread(self, make: Callable[[int], Measurement], key: str = "nll") -> Spread:
        """A figure of a measurement for every seed that has one."""
        names = dict.fromkeys(make(seed).name for seed in self._seeds)
        found = (self._figures.get(name, {}).get(key) for name in names)
        return Spread(tuple(value for value in found if value is not None))

    def one(self, measurement: Measurement, key: str = "nll") -> float | None:
        """A figure of one measurement."""
        return self._figures.get(measurement.name, {}).get(key)

    def ratio(self, base: Base, make: Callable[[int], Measurement]) -> Spread:
        """Share of the mean gain of fine-tuning, for every seed."""
        alone, tuned = self.one(Measurement(base)), self.spread(reference(base))
        if alone is None or not tuned.values:
            return Spread(())
        found = self.spread(make).values
        return Spread(tuple((alone - nll) / (alone - tuned.mean) for nll in found))


def write_report(figures: Figures, docs: Path, *, seeds: Sequence[int]) -> None:
    """Writes the pages and their figures.

    Args:
        figures: Measurement's name → its record.
        docs: Folder of the pages; if it has an `experiments_notes.md`, that is appended, with its
            numbers filled in and its claims checked; a `results_notes.md` becomes `results.md`.
        seeds: Of the trainings.

    Raises:
        NotesError: a claim of the notes does not hold for these figures.
    """
    table = Table(figures, seeds)
    transfer = {
        base: {
            "base alone": table.one(Measurement(base)),
            "proxy-tuning": _mean(table.spread(proxy_on(base))),
            "value": _mean(table.spread(value_on(base))),
            "fine-tuned": _mean(table.spread(reference(base))),
        }
        for base in _TARGETS
    }
    plot_transfer(transfer, docs / "transfer.png")
    plot_penalties(_penalty_curves(table), docs / "penalties.png")
    plot_strengths(_strength_curves(table), docs / "strengths.png")
    sections = [
        _introduction(seeds),
        _targets(table),
        _transfer(table),
        "![Transfer](transfer.png)",
        _trainings(
            table,
            "Connection schemes, the linear map and a head that reads several depths",
            matrix.schemes,
            note="All trained with S and the demo's settings; the linear map without a penalty "
            "(it would be pulled towards doing nothing) and with its own learning rate. The value "
            "network has two layers; its head reads the last one alone, or with `value.depths = 2` "
            "a mixture of both.",
        ),
        _trainings(
            table,
            "Penalty",
            matrix.penalties,
            note="λ · mean |z| (L1) or λ · mean z² (L2) over real tokens.",
        ),
        "![Penalty](penalties.png)",
        _trainings(table, "Initialisation of the value network", matrix.initialisations),
        _trainings(table, "Training bases", matrix.base_choices, bases=("S", "L", "L-continued")),
        _donor_size(table),
        _large_value(table),
        _maps(table),
        "## Strength\n\n![Strength](strengths.png)",
        references_section(docs / SWEEP_RECORD),
    ]
    complete = all(measurement.name in figures for measurement in matrix.measurements(tuple(seeds)))

    def filled(page: str) -> str:
        """The notes of a page with its numbers; empty: it has none."""
        notes = docs / f"{page}_notes.md"
        if not notes.exists():
            return ""
        lookup = make_lookup(figures, seeds)
        template = notes.read_text(encoding="utf-8").strip()
        return fill_notes(template, lookup, missing="error" if complete else "dash")

    sections.append(filled("experiments"))
    text = "\n\n".join(section for section in sections if section) + "\n"
    (docs / "experiments.md").write_text(text, encoding="utf-8")
    if results := filled("results"):
        (docs / "results.md").write_text(results + "\n", encoding="utf-8")
    update_post_training(docs)
    update_baselines(docs)
    update_lifts(docs)
    update_real_section(docs)


def _introduction(seeds: Sequence[int]) -> str:
    return f"""# Experiments

Made by `python -m ivl_jax.experiments`; every number is in [experiments.json](experiments.json).

The embedded family, held-out items (modules and people that no training item names). *NLL*: nats
per answer token, end of answer included, lower is better. *Facts*: share of questions about
invented people answered word for word. *Recall*: share of the same facts whose statement the model
completes when it is prompted with the statement's beginning, the form in which it has read it.
*Ratio*: share of the NLL gain of fine-tuning the same base, (NLL base − NLL with value) /
(NLL base − NLL fine-tuned), the latter the mean over its seeds. S has 0.69 M parameters, L 6.2 M,
X 2.0 M and another tokenizer, XL 25 M (it is not shipped); L-continued is L with further training
on statements about new invented people (*new facts*). Value networks are trained with S and never
see the other bases.
Mean ± half the range over those of the seeds {", ".join(map(str, seeds))} that were trained; a
single number is one seed.
Fine-tuned references: the best that was found on validation, by NLL or by the facts answered
([below](#fine-tuned-references)){_unsearched()}."""


def _unsearched() -> str:
    """Which references have not been searched for yet."""
    recorded = {model: read_reference(model) for model in MODELS}
    names = [model for model, found in recorded.items() if found is not None and found.tried == 1]
    return f"; of {' and '.join(names)} only L's setting has been tried yet" if names else ""


def _targets(table: Table) -> str:
    rows = []
    for base, target in zip(_TARGETS, (0.9, 0.9, 0.6), strict=True):
        found = table.ratio(base, value_on(base))
        rows.append(
            [f"transfer ratio to {base}", f"≥ {target}", found.show("{:.2f}"), _met(found, target)]
        )
    for base, target in zip(_TARGETS, (0.95, 0.95, 0.9), strict=True):
        answered = table.spread(value_on(base), "exact_match")
        known = table.one(Measurement(base), "recall")
        share = Spread(tuple(each / known for each in answered.values) if known else ())
        rows.append(
            [
                f"facts of {base} + value, as a share of what {base} recalls",
                f"≥ {target}",
                share.show("{:.2f}") + (f" (of {known:.1%})" if known else ""),
                _met(share, target),
            ]
        )
    small, large = table.spread(value_on("S")), table.spread(value_on("L"))
    known = bool(small.values and large.values)
    better = "yes" if known and large.mean < small.mean else "no"
    rows.append(
        [
            "NLL of L + value below S + value",
            small.show(),
            large.show(),
            better if known else _ABSENT,
        ]
    )
    for base in _TARGETS:
        value, proxy = table.spread(value_on(base)), table.spread(proxy_on(base))
        known = bool(value.values and proxy.values)
        better = "yes" if known and value.mean <= proxy.mean else "no"
        rows.append(
            [
                f"residual at least as good as proxy-tuning on {base} (NLL)",
                proxy.show(),
                value.show(),
                better if known else _ABSENT,
            ]
        )
    return "## Targets\n\n" + markdown(["what", "target", "measured", "met"], rows)


def _transfer(table: Table) -> str:
    rows = []
    for base in ("S", *_TARGETS):
        kinds: list[tuple[str, Callable[[int], Measurement]]] = [
            (base, lambda seed, base=base: Measurement(base)),
            (f"{base} + value", value_on(base)),
        ]
        if base != "S":
            label = f"{base} + (S fine-tuned − S), chosen by"
            kinds.append((f"{label} NLL", proxy_on(base)))
            kinds.append((f"{label} facts", proxy_on(base, "exact_match")))
        kinds.append((f"{base} fine-tuned, chosen by NLL", reference(base)))
        kinds.append((f"{base} fine-tuned, chosen by facts", reference(base, "exact_match")))
        for label, make in kinds:
            rows.append(
                [
                    label,
                    table.spread(make).show(),
                    table.ratio(base, make).show("{:.2f}"),
                    table.spread(make, "exact_match").show("{:.1%}"),
                    table.spread(make, "new_exact_match").show("{:.1%}"),
                ]
            )
    return "## Transfer\n\n" + markdown(["model", "NLL", "ratio", "facts", "new facts"], rows)


def _trainings(
    table: Table,
    title: str,
    make: Callable[[int], list[Training]],
    *,
    bases: Sequence[Base] = ("S", "L"),
    note: str = "",
) -> str:
    rows = []
    for index, training in enumerate(make(0)):
        row = [training.label]
        for base in bases:

            def at(seed: int, index: int = index, base: Base = base) -> Measurement:
                return on(base, Term(make(seed)[index]))

            row.append(table.spread(at).show())
            if base != "S":
                row.append(table.ratio(base, at).show("{:.2f}"))
            row.append(table.spread(at, "exact_match").show("{:.1%}"))
            if base == "L":
                row.append(table.spread(at, "validation_nll").show())
        rows.append(row)
    headings = [""]
    for base in bases:
        headings.append(f"NLL on {base}")
        headings += [] if base == "S" else [f"ratio on {base}"]
        headings.append(f"facts on {base}")
        headings += [f"validation NLL on {base}"] if base == "L" else []
    return "\n\n".join(part for part in (f"## {title}", note, markdown(headings, rows)) if part)


def _donor_size(table: Table) -> str:
    rows = []
    for base, larger in _LARGER.items():
        known = table.one(Measurement(base), "recall")
        row = [base, f"1 : {larger:g}"]
        row.append("–" if known is None else f"{known:.1%}")
        for make in (value_on(base), proxy_on(base), proxy_on(base, "exact_match")):
            row.append(table.ratio(base, make).show("{:.2f}"))
            row.append(table.spread(make, "exact_match").show("{:.1%}"))
        row.append(table.spread(reference(base, "exact_match"), "exact_match").show("{:.1%}"))
        rows.append(row)
    headings = ["target", "S : target", "recall", "ratio, value", "facts, value"]
    headings += ["ratio, proxy-tuning", "facts, proxy-tuning"]
    headings += ["ratio, proxy-tuning for facts", "facts, proxy-tuning for facts"]
    headings += ["facts, fine-tuned for facts"]
    return "## Size of the donor\n\n" + markdown(headings, rows)


def _large_value(table: Table) -> str:
    rows = []
    for label, training in (
        ("S", matrix.recipe),
        ("L (a value network of L's size)", matrix.large_value),
    ):
        row = [label]
        for base in ("S", "L"):

            def at(seed: int, base: Base = base, training: Any = training) -> Measurement:
                return on(base, Term(training(seed)))

            row += [table.spread(at).show(), table.spread(at, "exact_match").show("{:.1%}")]
        rows.append(row)
    headings = ["trained with", "NLL on S", "facts on S", "NLL on L", "facts on L"]
    return "## From large to small\n\n" + markdown(headings, rows)


def _maps(table: Table) -> str:
    rows = []
    for method in ("bytes", "dtw"):
        for centred in (False, True):

            def at(seed: int, method: Any = method, centred: bool = centred) -> Measurement:
                return Measurement("X", (Term(matrix.recipe(seed)),), method, centred)

            rows.append(
                [
                    method,
                    "yes" if centred else "no",
                    table.spread(at).show(),
                    table.ratio("X", at).show("{:.2f}"),
                    table.spread(at, "exact_match").show("{:.1%}"),
                ]
            )
    headings = ["alignment", "centred", "NLL on X", "ratio", "facts"]
    return "## Vocabulary maps\n\n" + markdown(headings, rows)


def _penalty_curves(table: Table) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Base → kind → (λ, mean NLL), ascending; λ = 0 is no penalty."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for base in ("S", "L"):
        for index, training in enumerate(matrix.penalties(0)):

            def at(seed: int, index: int = index, base: Base = base) -> Measurement:
                return on(base, Term(matrix.penalties(seed)[index]))

            found, (kind, weight) = table.spread(at), training.penalty
            if found.values:
                for each in ("l1", "l2") if kind == "none" else (kind,):
                    points = curves.setdefault(base, {}).setdefault(each, [])
                    points.append((weight, found.mean))
    return {
        base: {kind: sorted(points) for kind, points in kinds.items()}
        for base, kinds in curves.items()
    }


def _strength_curves(table: Table) -> dict[str, list[tuple[float, float]]]:
    """Base → (α, NLL), ascending; 0 is the base alone. One seed."""
    seed = table._seeds[0]
    curves = {}
    for base in ("S", "L"):
        points = [(0.0, table.one(Measurement(base)))]
        points += [
            (strength, table.one(on(base, Term(matrix.recipe(seed), strength))))
            for strength in (*matrix.STRENGTHS, 1.0)
        ]
        curves[base] = sorted((x, y) for x, y in points if y is not None)
    return curves


def _mean(spread: Spread) -> float | None:
    return spread.mean if spread.values else None


def _met(found: Spread, target: float) -> str:
    if not found.values:
        return _ABSENT
    return "yes" if round(found.mean, 2) >= target else "no"
