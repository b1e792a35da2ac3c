"""The section of docs/experiments.md on baselines, from docs/baselines.json.

In: the study's record, and the figures of the matrix for rows that both have. Out: Markdown,
between the page's two marks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.experiments.baselines.plan import (
    EDITED_STRENGTHS,
    LABELS,
    PER_SEED,
    POLICY_SCALES,
    POLICY_STRENGTHS,
    SEEDS,
    STRENGTHS,
    TARGET_ROWS,
    TEMPERATURES,
    UNLEARNING,
    Method,
    Row,
    Target,
)
from ivl_jax.experiments.estimate import ABSENT, Estimate
from ivl_jax.experiments.page_sections import markdown, put_section, wrapped
from ivl_jax.experiments.transfer.matrix import RECORD as MATRIX_RECORD
from ivl_jax.experiments.transfer.matrix import Measurement, fine_tuned, proxy

RECORD = "baselines.json"
BEGIN = "<!-- baselines: python -m ivl_jax.experiments baselines -->"
END = "<!-- end of baselines -->"
_TARGETS: tuple[Target, ...] = ("L", "L-continued", "X")
Figures = Mapping[str, Mapping[str, Any]]


def update_page(docs: Path) -> None:
    """Put the section into `docs/experiments.md`, between its marks or at its end.

    Args:
        docs: Folder of the page and of the records; without the study's nothing is written.
    """
    file = docs / RECORD
    if not file.exists():
        return
    matrix = docs / MATRIX_RECORD
    figures = json.loads(matrix.read_text(encoding="utf-8"))["measured"] if matrix.exists() else {}
    shown = section(json.loads(file.read_text(encoding="utf-8")), figures)
    put_section(docs / "experiments.md", shown, begin=BEGIN, end=END)


def section(record: Mapping[str, Any], matrix: Figures) -> str:
    """The section's Markdown.

    Args:
        record: From `baselines.record_of`.
        matrix: Figures of the matrix by the name of their measurement.

    Returns:
        What was compared, one table per target, unlearning, what is missing.
    """
    measured, items = record["measured"], record["items_sha256"]
    same_items = {
        name: figures for name, figures in matrix.items() if figures.get("items_sha256") == items
    }
    parts = [_introduction()]
    for target in _TARGETS:
        parts += _titled(f"{target}: baselines", _target_table(target, measured, same_items))
    parts += _titled("Unlearning by negative strength", _unlearning_table(measured))
    return "\n\n".join([*parts, *_missing(record)])


def _introduction() -> str:
    scales = {name: ", ".join(f"{s:g}" for s in each) for name, each in POLICY_SCALES.items()}
    text = f"""Made by `python -m ivl_jax.experiments baselines`; every number is in
[baselines.json](baselines.json). The items, the value network (residual, L1, λ = 1, trained beside
S) and the columns are those of the comparisons above.

Settings are chosen by NLL on {TARGET_ROWS} validation rows, half of them facts: *calibrated*, α in
{_list(STRENGTHS)} and a temperature in {_list(TEMPERATURES)}; the strength policies, α in
{_list(POLICY_STRENGTHS)} and a scale in {scales["entropy"]} nats (entropy) or {scales["kl"]} nats
(divergence). *Soup*: the mean of three values' parameters. *Proxy-tuning* has
the same choice of α and temperature. *S edited*: base + α (S fine-tuned on half of
the same {TARGET_ROWS} rows − S), its rate not swept, α in {_list(EDITED_STRENGTHS)} by the other
half. *Diff vector*: the parameters of L
fine-tuned minus those of L, added to L-continued, which has the same shape; LiNeS scales it by
layer. Fine-tuned L and S are the recorded references. A temperature changes no greedy answer.
Mean ± half of the 95 % t interval over seeds; a single number is one seed."""
    return "## Baselines and strength policies\n\n" + wrapped(text)


def _target_table(target: Target, measured: Figures, matrix: Figures) -> str:
    keys = {"nll": "{:.3f}", "exact_match": "{:.1%}"}
    heads = ["model", "NLL", "facts"]
    if target == "L-continued":
        keys["new_exact_match"], heads = "{:.1%}", [*heads, "new facts"]
    found = []
    methods: list[Method] = [method for method in LABELS if method != "unlearned"]
    for method in methods:
        seeds = SEEDS if method in PER_SEED else SEEDS[:1]
        names = [Row(target, method, seed).name for seed in seeds]
        cells = _cells(measured, names, keys)
        if set(cells) != {ABSENT}:
            found.append([LABELS[method], *cells, _settings(measured, names)])
    if not found:
        return ""
    known: dict[str, Callable[[int], Measurement]] = {
        f"{target} alone": lambda _: Measurement(target),
        "proxy-tuning with S, α = 1": lambda seed: proxy(target, seed),
        f"{target} fine-tuned": lambda seed: Measurement(fine_tuned(target, seed)),
    }
    above = []
    for label, make in known.items():
        names = list(dict.fromkeys(make(seed).name for seed in SEEDS))
        cells = _cells(matrix, names, keys)
        if set(cells) != {ABSENT}:
            above.append([label, *cells, ""])
    return markdown([*heads, "chosen"], [*above[:1], *found, *above[1:]])


def _cells(figures: Figures, names: Sequence[str], forms: Mapping[str, str]) -> list[str]:
    cells = []
    for key, form in forms.items():
        values = [figures.get(name, {}).get(key) for name in names]
        cells.append(Estimate(tuple(x for x in values if x is not None)).show(form))
    return cells


def _settings(measured: Figures, names: Sequence[str]) -> str:
    found = [measured[name]["setting"] for name in names if name in measured]
    return "; ".join(dict.fromkeys(setting for setting in found if setting))


def _unlearning_table(measured: Figures) -> str:
    forms = {
        "forgotten_match": "{:.1%}",
        "retained_match": "{:.1%}",
        "forgotten_nll": "{:.3f}",
        "retained_nll": "{:.3f}",
        "docstring_nll": "{:.3f}",
    }
    rows = []
    for strength in UNLEARNING:
        name = Row("L", "unlearned", strength=strength).name
        if name in measured:
            rows.append([f"{strength:g}", *_cells(measured, [name], forms)])
    if not rows:
        return ""
    note = """A value network continues, from the one that is used, on the facts about every other
person of the test split; L + value − β (that − value) should answer the others as before. *Facts*
and *NLL* of both halves, and the NLL of docstrings. One seed; no β is chosen."""
    heads = ["β", "facts, forgotten", "facts, retained"]
    heads += ["NLL, forgotten", "NLL, retained", "NLL, docstrings"]
    return wrapped(note) + "\n\n" + markdown(heads, rows)


def _missing(record: Mapping[str, Any]) -> list[str]:
    missing = record["missing"]
    if not missing:
        return []
    names = ", ".join(f"`{name}`" for name in missing)
    total = len(missing) + len(record["measured"])
    return [
        wrapped(
            f"Not measured yet ({len(missing)} of {total} measurements): {names}. The same command "
            "resumes with them."
        )
    ]


def _titled(title: str, body: str) -> list[str]:
    return [f"### {title}\n\n{body}"] if body else []


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
