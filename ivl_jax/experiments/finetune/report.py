"""The section on fine-tuned references of the experiments' page.

In: `finetune_sweep.json`. Out: Markdown: for each model and set of demonstrations the chosen runs
with their test figures, and the best run of everything that was varied, so that it can be seen on
which side of the best each value was tried.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.experiments.estimate import ABSENT, Estimate
from ivl_jax.experiments.finetune.settings import (
    Criterion,
    Curve,
    Point,
    Setting,
    best_point,
    best_setting,
    criteria,
)
from ivl_jax.experiments.page_sections import markdown, wrapped

RECORD = "finetune_sweep.json"
_BY: Mapping[Criterion, str] = {"nll": "NLL", "exact_match": "facts"}
_KINDS = {"facts": "facts alone", "docstrings": "docstrings alone", "both": "both"}


def references_section(file: Path) -> str:
    """The section.

    Args:
        file: The record of the sweep; without one the section is empty.

    Returns:
        Markdown, or an empty text.
    """
    tried = read_runs(file)
    if not tried:
        return ""
    record = json.loads(file.read_text(encoding="utf-8"))
    unfinished = {(one["model"], one["kinds"]) for one in record["chosen"] if not one["finished"]}
    note = ""
    if unfinished:
        named = ", ".join(f"{model} on {_KINDS[kinds]}" for model, kinds in sorted(unfinished))
        note = f"\n\nNot finished yet, so its best may still change: {named}."
    return "\n\n".join(
        [
            "## Fine-tuned references",
            wrapped(_INTRODUCTION.format(runs=len(tried)) + note),
            _chosen(record["chosen"], tried),
            _TRADEOFF,
            "### What was tried",
            _variants(tried),
        ]
    )


def read_runs(file: Path) -> dict[Setting, Curve]:
    """The runs of a record of the sweep with their validation curves.

    Args:
        file: The record; a missing one has no runs.
    """
    if not file.exists():
        return {}
    return {
        Setting(**run["setting"]): [Point(**point) for point in run["curve"]]
        for run in json.loads(file.read_text(encoding="utf-8"))["runs"]
    }


_INTRODUCTION = """Made by `python -m ivl_jax.experiments.finetune_sweep`; every run with its
validation curve is in [finetune_sweep.json](finetune_sweep.json) ({runs} runs). Each run is
evaluated 20 times and stopped early twice: where the validation NLL is lowest, and where most of
validation's facts are answered word for word; on both kinds, without a higher NLL of docstrings
than before fine-tuning, since a model that has forgotten one task is no reference for both. The
grid grows until the best rate has been beaten by neither neighbour and the run is neither too long
nor too short: a longer one is not tried where the last lengthening gained less than 0.02 nats and 2
points. A rate or length at the end of the ladder
(1e-5 to 3e-2; 1 to 30 epochs) has no further neighbour. *Bracket* says which rates were tried
beside the chosen one. *Step* is where it was stopped, as a share of the run. Weight decay, repeated
facts and rows of statements were tried at the best rate for facts and, where one of them was the
best of all, at other rates. Rows of statements are pre-training text, 4 rows per step about all
invented people, those of the test split included, in which no question is asked. Test figures are
means over seeds ± half of the 95 % t interval."""
_TRADEOFF = """No run is best at both. Each point is one evaluation of a run on both kinds of
demonstrations; the star is the value network of S on the same model:

![Facts answered against the NLL of docstrings](tradeoff.png)"""


def _chosen(chosen: Sequence[Mapping[str, Any]], tried: Mapping[Setting, Curve]) -> str:
    rows = []
    for one in chosen:
        setting, criterion = Setting(**one["setting"]), one["criterion"]
        point = best_point(tried[setting], criterion)
        rows.append(
            [
                one["model"],
                _KINDS[one["kinds"]],
                _BY[criterion],
                setting.label,
                f"{setting.learning_rate:g}",
                _bracket(setting, tried),
                f"{setting.epochs:g}",
                f"{point.step / tried[setting][-1].step:.0%}",
                f"{point.nll:.3f}",
                _share(point.exact_match),
                _spread(one["test"], "fact_nll", "{:.3f}"),
                _spread(one["test"], "docstring_nll", "{:.3f}"),
                _spread(one["test"], "nll", "{:.3f}"),
                _spread(one["test"], "exact_match", "{:.1%}"),
            ]
        )
    return markdown(
        [
            *("model", "demonstrations", "chosen by", "what", "rate", "bracket", "epochs", "step"),
            *("validation NLL", "validation facts", "test NLL of facts", "of docstrings"),
            *("of all", "test facts"),
        ],
        rows,
    )


def _bracket(setting: Setting, tried: Mapping[Setting, Curve]) -> str:
    """The next smaller and larger rate that were tried with all else equal."""
    rates = {
        one.learning_rate
        for one in tried
        if (one.variant, one.epochs, one.seed) == (setting.variant, setting.epochs, setting.seed)
    }
    below = max((rate for rate in rates if rate < setting.learning_rate), default=None)
    above = min((rate for rate in rates if rate > setting.learning_rate), default=None)
    return " and ".join("none" if rate is None else f"{rate:g}" for rate in (below, above))


def _variants(tried: Mapping[Setting, Curve]) -> str:
    """One row per model, demonstrations and variant: its best run by each criterion."""
    groups: dict[Setting, dict[Setting, Curve]] = {}
    for setting, curve in tried.items():
        if not setting.seed:
            groups.setdefault(setting.variant, {})[setting] = curve
    rows = []
    for variant, some in sorted(groups.items(), key=lambda group: _order(group[0])):
        cells = [_best_of(some, criterion) for criterion in criteria(variant.kinds)]
        what = [variant.model, _KINDS[variant.kinds], variant.label, str(len(some))]
        rows.append([*what, *cells, *[ABSENT] * (2 - len(cells))])
    return markdown(
        ["model", "demonstrations", "what", "runs", "lowest validation NLL", "most facts"], rows
    )


def _best_of(some: Mapping[Setting, Curve], criterion: Criterion) -> str:
    """The best run by a criterion: its figure, and the setting in brackets."""
    best = best_setting(some, criterion)
    point = best_point(some[best], criterion)
    shown = f"{point.nll:.3f}" if criterion == "nll" else _share(point.exact_match)
    if criterion == "exact_match" and point.docstring_nll is not None:
        shown += f" at {point.docstring_nll:.3f} of docstrings"
    return f"{shown} ({best.learning_rate:g}, {best.epochs:g} epochs)"


def _order(variant: Setting) -> tuple[int, int, str]:
    models, kinds = ["S", "L", "L-continued", "X", "XL"], list(_KINDS)
    return models.index(variant.model), kinds.index(variant.kinds), variant.label


def _spread(tests: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    return Estimate(tuple(test[key] for test in tests)).show(form)


def _share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"
