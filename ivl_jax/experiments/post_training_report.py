"""The section of docs/experiments.md on post-training, from docs/post_training.json.

In: figures by the name of their measurement. Out: Markdown, between the page's two marks.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from ivl_jax.experiments.post_training_plan import (
    SEEDS,
    Kind,
    Measurement,
    Model,
    alone,
    distilled,
    folded,
    value_on,
)

RECORD = "post_training.json"
BEGIN = "<!-- post-training: python -m ivl_jax.experiments post_training -->"
END = "<!-- end of post-training -->"
_ABSENT = "–"
_CONFIDENCE = 0.95
Figures = Mapping[str, Mapping[str, Any]]
Make = Callable[[int], Measurement]
_MET = {None: _ABSENT, True: "yes", False: "no"}
_NAMES: dict[Kind, str] = {"sft": "SFT", "dpo": "SFT → DPO", "grpo": "SFT → GRPO"}


class Estimate(NamedTuple):
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % t interval of the mean; 0 for a single seed, which has none.

        >>> round(Estimate((1.0, 2.0, 3.0)).half_width, 3)
        2.484
        """
        count = len(self.values)
        if count < 2:
            return 0.0
        quantile = float(student_t.ppf((1 + _CONFIDENCE) / 2, count - 1))
        return quantile * statistics.stdev(self.values) / math.sqrt(count)

    def show(self, form: str = "{:.3f}") -> str:
        """The mean, and with several seeds half of the interval.

        >>> Estimate((0.5,)).show("{:.1%}"), Estimate(()).show()
        ('50.0%', '–')
        """
        if not self.values:
            return _ABSENT
        shown = form.format(self.mean)
        return f"{shown} ± {form.format(self.half_width)}" if len(self.values) > 1 else shown


class Table:
    """Looks figures up by seed."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def at(self, measurement: Measurement, key: str) -> float | None:
        """A figure; None: not measured."""
        return self._figures.get(measurement.name, {}).get(key)

    def over_seeds(self, make: Make, key: str) -> Estimate:
        """A figure of every seed that has it."""
        names = {make(seed).name: make(seed) for seed in SEEDS}
        found = [self.at(measurement, key) for measurement in names.values()]
        return Estimate(tuple(value for value in found if value is not None))

    def gain(self, make: Make, before: Make, key: str) -> Estimate:
        """A figure minus that of another measurement, seed by seed."""
        found = [(self.at(make(seed), key), self.at(before(seed), key)) for seed in SEEDS]
        return Estimate(tuple(x - y for x, y in found if x is not None and y is not None))

    def carried(self, base: Model, kind: Kind, key: str, *, origin: float) -> Estimate:
        """Gain with the borrowed value network over the mean gain of the base trained itself.

        Args:
            base: L or X.
            kind: The objective.
            key: The figure.
            origin: What the figure is without any training.
        """
        borrowed = self.over_seeds(lambda seed: value_on(base, kind, seed), key)
        own = self.over_seeds(lambda seed: alone(base, kind, seed), key)
        if not own.values or own.mean <= origin:
            return Estimate(())
        return Estimate(tuple((each - origin) / (own.mean - origin) for each in borrowed.values))

    def kept(self, make: Make, whole: Make, base: Model, key: str) -> Estimate:
        """Share of a teacher's gain over the base that arrives in a student, seed by seed."""
        start = self.at(Measurement(base), key)
        if start is None:
            return Estimate(())
        found = [(self.at(make(seed), key), self.at(whole(seed), key)) for seed in SEEDS]
        return Estimate(
            tuple(
                (student - start) / (teacher - start)
                for student, teacher in found
                if student is not None and teacher is not None and teacher != start
            )
        )


def update_page(docs: Path) -> None:
    """Put the section into `docs/experiments.md`, between its marks or at its end.

    Args:
        docs: Folder of the page and of the figures; without figures nothing is written.
    """
    record, page = docs / RECORD, docs / "experiments.md"
    if not record.exists():
        return
    text = page.read_text(encoding="utf-8") if page.exists() else "# Experiments\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    shown = section(json.loads(record.read_text(encoding="utf-8")))
    parts = [before.rstrip(), BEGIN, shown, END, after.strip()]
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def section(figures: Figures) -> str:
    """The section's Markdown.

    Args:
        figures: Measurement's name → its record.

    Returns:
        Targets, one table per base, and distillation.
    """
    table = Table(figures)
    return "\n\n".join(
        [
            _INTRODUCTION,
            "### Post-training targets\n\n" + _targets(table),
            *(f"### {base}\n\n" + _models(table, base) for base in ("S", "L", "X")),
            "### Distillation\n\n" + _distillation(table),
        ]
    )


_INTRODUCTION = """## Post-training through the composition

Made by `python -m ivl_jax.experiments post_training`; every number is in
[post_training.json](post_training.json).

Questions about people that no training item names. *SFT*: a value network beside S, trained on a
tenth of the demonstrations. *SFT → DPO* and *SFT → GRPO* start from it: DPO on pairs whose rejected
answers were sampled from S with that value network on the same question, GRPO on whether the answer
is right word for word. *Trained itself*: the base fully fine-tuned by the same objectives, SFT
first, with its own frozen start as the reference. *Facts*: share of questions answered word for
word, greedily. *NLL*: nats per token of the right answers. *Pairs*: share of held-out pairs in
which the right answer gained more over the base than the wrong one (no training: 50 %); *margin*:
by how much, in nats. *KL*: exact KL(model ‖ base), nats per token of the right answers.
*Carried*: the gain over the base that S's value network brings, as a share of what the same
objective brings when the base is trained itself. Mean ± half of the 95 % t interval over seeds; a
single number is one seed."""


def _targets(table: Table) -> str:
    rows = []
    gain = table.gain(_on("S", "grpo"), _on("S", "sft"), "exact_match")
    sure = len(gain.values) > 1 and gain.mean - gain.half_width > 0
    rows.append(
        (
            "facts gained by GRPO on S",
            "≥ 20 points, interval excludes 0",
            gain.show("{:.1%}"),
            None if not gain.values else sure and gain.mean >= 0.2,
        )
    )
    carried: list[tuple[Kind, str, float]] = [
        ("grpo", "exact_match", 0.0),
        ("dpo", "pair_accuracy", 0.5),
    ]
    for kind, key, origin in carried:
        for base in ("L", "X"):
            found = table.carried(base, kind, key, origin=origin)
            target = 0.8 if base == "L" else None
            rows.append(_row(f"{kind.upper()} carried to {base}", found, target))
    accuracy = table.over_seeds(_on("S", "dpo"), "pair_accuracy")
    rows.append(_row("DPO's accuracy on held-out pairs, S", accuracy, 0.9))
    for key, name in (("nll", "NLL"), ("exact_match", "facts")):
        kept = table.kept(folded, _on("L", "grpo"), "L", key)
        rows.append(_row(f"kept by folding into L, {name}", kept, 0.95))
    cells = [
        [what, target, found, _MET[met] if target else ""] for what, target, found, met in rows
    ]
    return _markdown(["what", "target", "measured", "met"], cells)


def _row(what: str, found: Estimate, target: float | None) -> tuple[str, str, str, bool | None]:
    met = None if target is None or not found.values else round(found.mean, 2) >= target
    return what, "" if target is None else f"≥ {target}", found.show("{:.2f}"), met


def _models(table: Table, base: Model) -> str:
    rows = [_figures(table, base, lambda seed: Measurement(base))]
    for kind, name in _NAMES.items():
        rows.append(_figures(table, f"{base} + value, {name}", _on(base, kind)))
    if base != "S":
        for kind, name in _NAMES.items():
            rows.append(
                _figures(table, f"{base} trained itself, {name}", _alone(base, kind)),
            )
    return _markdown(_HEADINGS, rows)


def _distillation(table: Table) -> str:
    note = (
        "A value network of S's size that learned, beside L, from L trained itself (SFT → GRPO), "
        "without right answers as labels; and L trained to predict what L with S's value network "
        "(SFT → GRPO) predicts, which is one ordinary model. *Kept*: share of the teacher's gain "
        "over L."
    )
    rows = []

    def of_tuned(seed: int) -> Measurement:
        return distilled("L", seed)

    for name, make, teacher in (
        ("L + value, from the tuned L", of_tuned, _alone("L", "grpo")),
        ("L, folded from L + value", folded, _on("L", "grpo")),
    ):
        kept = [
            table.kept(make, teacher, "L", key).show("{:.2f}") for key in ("nll", "exact_match")
        ]
        rows.append([*_figures(table, name, make), *kept])
    for base in ("S", "X"):

        def carried(seed: int, base: Model = base) -> Measurement:
            return distilled(base, seed)

        rows.append([*_figures(table, f"{base} + value, from the tuned L", carried), "", ""])
    return note + "\n\n" + _markdown([*_HEADINGS, "NLL kept", "facts kept"], rows)


_HEADINGS = ("model", "facts", "NLL", "pairs", "margin", "KL to base")


def _figures(table: Table, name: str, make: Make) -> list[str]:
    forms = {
        "exact_match": "{:.1%}",
        "nll": "{:.3f}",
        "pair_accuracy": "{:.1%}",
        "pair_margin": "{:.1f}",
        "kl": "{:.2f}",
    }
    return [name, *(table.over_seeds(make, key).show(form) for key, form in forms.items())]


def _on(base: Model, kind: Kind) -> Make:
    return lambda seed: value_on(base, kind, seed)


def _alone(base: Model, kind: Kind) -> Make:
    return lambda seed: alone(base, kind, seed)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
