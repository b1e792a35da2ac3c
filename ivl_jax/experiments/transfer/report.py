"""The page of the matrix: what is compared, the targets, the main table, and the other sections.

In: figures by the name of their measurement. Out: `experiments.md`, `results.md` and their PNGs.
"""

from collections.abc import Sequence
from pathlib import Path

from ivl_jax.experiments.estimate import ABSENT, Estimate
from ivl_jax.experiments.figures_by_seed import Figures
from ivl_jax.experiments.finetune.plan import MODELS
from ivl_jax.experiments.finetune.references import read_reference
from ivl_jax.experiments.finetune.report import RECORD, read_runs, references_section
from ivl_jax.experiments.page_sections import markdown, wrapped
from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.ablations import (
    donor_size_section,
    large_value_section,
    maps_section,
    penalty_curves,
    strength_curves,
    table_of,
    trainings_section,
)
from ivl_jax.experiments.transfer.matrix import (
    Base,
    Measurement,
    proxy_on,
    reference,
    value_on,
)
from ivl_jax.experiments.transfer.notes import fill_notes
from ivl_jax.experiments.transfer.plots import (
    plot_penalties,
    plot_strengths,
    plot_tradeoff,
    plot_transfer,
)
from ivl_jax.experiments.transfer.subjects import make_lookup
from ivl_jax.experiments.transfer.table import Interval, Make, Table, with_interval

_TARGETS: tuple[Base, ...] = ("L", "L-continued", "X")
_RATIOS = (0.95, 0.9, 0.9)
_RECALLED = (0.95, 0.95, 0.9)
_REFERENCE_FACTS = 0.5
_BARS: tuple[str, ...] = ("base alone", "proxy-tuning", "value", "fine-tuned")


def write_report(figures: Figures, docs: Path, *, seeds: Sequence[int]) -> None:
    """Writes the pages and their figures.

    Args:
        figures: Measurement's name → its record.
        docs: Folder of the pages; if it has an `experiments_notes.md`, that is put in, with its
            numbers filled in and its claims checked; a `results_notes.md` becomes `results.md`.
        seeds: Of the trainings.

    Raises:
        NotesError: a claim of the notes does not hold for these figures.
    """
    table = Table(figures, seeds)
    plot_transfer(
        {
            key: {base: _bars(table, base, key) for base in _TARGETS}
            for key in ("nll", "exact_match")
        },
        docs / "transfer.png",
    )
    plot_penalties(penalty_curves(table), docs / "penalties.png")
    plot_strengths(strength_curves(table), docs / "strengths.png")
    _plot_tradeoff(table, docs)
    complete = all(measurement.name in figures for measurement in matrix.measurements(tuple(seeds)))

    def filled(page: str) -> str:
        """The notes of a page with its numbers; empty: it has none."""
        notes = docs / f"{page}_notes.md"
        if not notes.exists():
            return ""
        lookup = make_lookup(figures, seeds)
        template = notes.read_text(encoding="utf-8").strip()
        return fill_notes(template, lookup, missing="error" if complete else "dash")

    sections = [
        _introduction(seeds),
        _targets(table),
        _transfer(table),
        "![Transfer](transfer.png)",
        _outside(table),
        _whose_knowledge(table),
        filled("experiments"),
        trainings_section(
            table,
            "Connection schemes, the linear map and a head that reads several depths",
            matrix.schemes,
            note="All trained with S and the demo's settings; the linear map without a penalty "
            "(it would be pulled towards doing nothing) and with its own learning rate. The value "
            "network has two layers; its head reads the last one alone, or with `value.depths = 2` "
            "a mixture of both.",
        ),
        trainings_section(
            table,
            "Penalty",
            matrix.penalties,
            note="λ · mean |z| (L1) or λ · mean z² (L2) over real tokens.",
        ),
        "![Penalty](penalties.png)",
        trainings_section(table, "Initialisation of the value network", matrix.initialisations),
        trainings_section(
            table, "Training bases", matrix.base_choices, bases=("S", "L", "L-continued")
        ),
        donor_size_section(table),
        large_value_section(table),
        maps_section(table),
        "## Strength\n\nNLL on the test items; α = 1 is what was trained.\n\n"
        "![Strength](strengths.png)",
        references_section(docs / RECORD),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    (docs / "experiments.md").write_text(text, encoding="utf-8")
    if results := filled("results"):
        (docs / "results.md").write_text(results + "\n", encoding="utf-8")


def _introduction(seeds: Sequence[int]) -> str:
    text = f"""Made by `python -m ivl_jax.experiments`; every number is in
[experiments.json](experiments.json).

The embedded family, held-out items: questions on modules and people that no training item names.
In pre-training the bases have read most of these modules and statements about all of these people,
but no question. *NLL*: nats per answer token, end of answer included, lower is better; of facts and
of docstrings apart, as most tokens are docstrings'. *Facts*: share of questions about invented
people answered word for word. *Recall*: share of the same facts whose statement the model completes
when it is prompted with the statement's beginning, the form in which it has read it. *Ratio*: share
of the NLL gain of fine-tuning the same base, (NLL base − NLL with value) / (NLL base − NLL
fine-tuned), the latter the mean over its seeds. S has 0.69 M parameters, L 6.2 M, X 2.0 M and
another tokenizer, XL 25 M (it is not shipped); L-continued is L with further training on statements
about new invented people (*new facts*), S-continued is S trained on in the same way. Value networks
are trained with S and never see the other bases. *Proxy-tuning*: base + (S fine-tuned − S).

Mean ± half of the 95 % t interval over the seeds {", ".join(map(str, seeds))}; a single number is
one seed. In brackets: 95 % of the means that drawing people and modules anew gives, paired between
the models that are compared. Fine-tuned references: the best that was found on validation, by NLL
or by the facts answered ([below](#fine-tuned-references)){_unsearched()}."""
    return "# Experiments\n\n" + wrapped(text)


def _unsearched() -> str:
    """Which references have not been searched for yet."""
    recorded = {model: read_reference(model) for model in MODELS}
    names = [model for model, found in recorded.items() if found is not None and found.tried == 1]
    return f"; of {' and '.join(names)} only L's setting has been tried yet" if names else ""


def _targets(table: Table) -> str:
    rows = []
    for base, target in zip(_TARGETS, _RATIOS, strict=True):
        found, interval = (
            table.ratio(base, value_on(base)),
            table.ratio_interval(base, value_on(base)),
        )
        shown = with_interval(found, interval)
        rows.append(
            [f"transfer ratio to {base}", f"≥ {target}", shown, _met(found, target, interval)]
        )
    for base, target in zip(_TARGETS, _RECALLED, strict=True):
        found, known = table.recalled(base, value_on(base)), table.one(Measurement(base), "recall")
        share = f" (of {known:.1%})" if known else ""
        what = f"facts of {base} + value, as a share of what {base} recalls"
        rows.append([what, f"≥ {target}", found.show("{:.2f}") + share, _met(found, target)])
    found = table.over_seeds(reference("L", "exact_match"), "exact_match")
    what = "facts of L fine-tuned, chosen by facts"
    rows.append([what, f"≥ {_REFERENCE_FACTS:.0%}", found.show("{:.1%}"), _met(found, 0.5)])
    small, large = table.over_seeds(value_on("S")), table.over_seeds(value_on("L"))
    rows.append(
        ["NLL of L + value below S + value", small.show(), large.show(), _below(large, small)]
    )
    for base in _TARGETS:
        value, proxy = table.over_seeds(value_on(base)), table.over_seeds(proxy_on(base))
        what = f"NLL of {base} + value at most that of proxy-tuning"
        rows.append([what, proxy.show(), value.show(), _below(value, proxy)])
    return "## Targets\n\n" + markdown(["what", "target", "measured", "met"], rows)


def _kinds(base: Base) -> list[tuple[str, Make]]:
    """What is compared on a base, with labels."""
    kinds: list[tuple[str, Make]] = [
        (base, lambda seed: Measurement(base)),
        (f"{base} + value", value_on(base)),
    ]
    if base != "S":
        kinds.append((f"{base} + proxy-tuning, S chosen by NLL", proxy_on(base)))
        kinds.append((f"{base} + proxy-tuning, S chosen by facts", proxy_on(base, "exact_match")))
    kinds.append((f"{base} fine-tuned, chosen by NLL", reference(base)))
    kinds.append((f"{base} fine-tuned, chosen by facts", reference(base, "exact_match")))
    return kinds


def _transfer(table: Table) -> str:
    rows = []
    for base in ("S", *_TARGETS):
        for label, make in _kinds(base):
            ratio = table.ratio(base, make)
            facts = table.over_seeds(make, "exact_match")
            by_kind = (table.over_seeds(make, f"{kind}_nll") for kind in ("fact", "docstring"))
            rows.append(
                [
                    label,
                    table.over_seeds(make).show(),
                    *map(_mean, by_kind),
                    with_interval(ratio, table.ratio_interval(base, make)),
                    _mean(table.ratio(base, make, "docstring_nll"), "{:.2f}"),
                    with_interval(facts, table.share_interval(make), "{:.0%}"),
                    _mean(table.over_seeds(make, "new_exact_match"), "{:.0%}"),
                ]
            )
    headings = ["model", "NLL", "of facts", "of docstrings", "ratio", "ratio on docstrings"]
    return "## Transfer\n\n" + table_of([*headings, "facts", "new facts"], rows)


def _outside(table: Table) -> str:
    rows = [
        [
            label,
            table.over_seeds(make, "source_nll").show(),
            table.over_seeds(make, "recall").show("{:.1%}"),
        ]
        for base in ("S", *_TARGETS)
        for label, make in _kinds(base)
    ]
    return "\n\n".join(
        [
            "### Outside the task",
            wrapped(
                "What the same models do with text that is no answer: NLL per token of source "
                "files that no training has seen (X's tokens are others), and recall, the "
                "statements on test people that they complete. A fine-tuning with rows of "
                "statements goes on reading them: where its recall is above the base's, it has "
                "learned facts, and not only how to answer."
            ),
            table_of(["model", "NLL of source text", "recall"], rows),
        ]
    )


def _whose_knowledge(table: Table) -> str:
    rows = [
        [
            f"{base} + value",
            *(
                table.over_seeds(value_on(base), f"{which}_match").show("{:.1%}")
                for which in ("known", "unknown")
            ),
        ]
        for base in ("S", *_TARGETS)
    ]
    return "\n\n".join(
        [
            "### Whose knowledge",
            wrapped(
                "The value network was pre-trained as S and knows facts of its own. Facts "
                "answered, among those that S recalls and among those that it does not:"
            ),
            table_of(["model", "of those that S recalls", "of the others"], rows),
        ]
    )


def _bars(table: Table, base: Base, key: str) -> dict[str, float | None]:
    """Heights of a target's bars, by kind."""
    by_facts = key == "exact_match"
    criterion = "exact_match" if by_facts else "nll"
    makes = (
        lambda seed: Measurement(base),
        proxy_on(base, criterion),
        value_on(base),
        reference(base, criterion),
    )
    found = [table.over_seeds(make, key) for make in makes]
    return {
        kind: each.mean if each.values else None for kind, each in zip(_BARS, found, strict=True)
    }


def _plot_tradeoff(table: Table, docs: Path) -> None:
    """Facts answered against the NLL of docstrings, on validation, of every step of the sweep."""
    tried = read_runs(docs / RECORD)
    keys = ("validation_docstring_nll", "validation_exact_match")
    panels = {}
    for base in ("L", "X", "S"):
        curves = {
            setting: [(point.docstring_nll, point.exact_match) for point in curve]
            for setting, curve in tried.items()
            if (setting.model, setting.kinds) == (base, "both")
        }
        found = [table.over_seeds(value_on(base), key) for key in keys]
        value = tuple(each.mean for each in found) if all(each.values for each in found) else None
        panels[base] = {setting.label: [] for setting in curves}, value
        for setting, points in curves.items():
            panels[base][0][setting.label] += points
    plot_tradeoff(panels, docs / "tradeoff.png")


def _mean(found: Estimate, form: str = "{:.3f}") -> str:
    return form.format(found.mean) if found.values else ABSENT


def _below(one: Estimate, other: Estimate) -> str:
    if not one.values or not other.values:
        return ABSENT
    return "yes" if one.mean <= other.mean else "no"


def _met(found: Estimate, target: float, interval: Interval | None = None) -> str:
    if not found.values:
        return ABSENT
    if found.mean < target:
        return "no"
    return "yes" if interval is None or interval.low >= target else "yes, by the mean"
