"""The demo's figure: what the value network changes on its training base and on other bases.

In: the demo's report. Out: a PNG.
"""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_GREY, _BLUE, _DARK = "#b8bec7", "#2f6fde", "#20242b"
# Suffix of a model's name → its label in the figure, and its colour.
_KINDS = {
    "": ("\nalone", _GREY),
    "+value": ("\n+ value", _BLUE),
    "-finetuned": ("\ntuned\nfor NLL", _DARK),
    "-finetuned-for-facts": ("\ntuned\nfor facts", _DARK),
}
# Positions of the bars: those of S, a gap, those of L, a gap, those of X.
_PLACES = {
    "S": 0.0,
    "S+value": 1.0,
    "L": 2.5,
    "L+value": 3.5,
    "L-finetuned": 4.5,
    "L-finetuned-for-facts": 5.5,
    "X": 7.0,
    "X+value": 8.0,
    "X-finetuned": 9.0,
    "X-finetuned-for-facts": 10.0,
}


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Draws response NLL and exact match of every model side by side.

    Args:
        report: `nll` and `exact_match` (name → number or None), `transfer_ratio` (target → number
            or None), `items` (kind → how many were asked), and perhaps `recorded`, a footnote.
        path: The PNG to write.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, report["nll"], form="{:.2f}")
    items = report["items"]
    left.set_title(
        f"NLL of the right answers to {items['fact']} questions on facts and "
        f"{items['docstring']} on docstrings\nnats per token, lower is better",
        fontsize=10,
    )
    _bars(right, report["exact_match"], form="{:.0%}")
    right.set_title(
        f"The {items['fact']} questions on facts answered word for word, higher is better\n"
        "(tuned models: recorded; the best by each of the two figures, on validation)",
        fontsize=10,
    )
    right.set_ylim(0, 1.08)
    gains = [
        f"{ratio:.0%} of the gain of fine-tuning {target} itself"
        for target, ratio in report["transfer_ratio"].items()
        if ratio is not None
    ]
    figure.suptitle(
        "One value network, trained beside S (0.7 M) only, added to L (6.2 M) and, through a "
        "vocabulary map, to X (2 M, another tokenizer)"
        + (f"\nin NLL: {', '.join(gains)}" if gains else ""),
        fontsize=11,
        fontweight="bold",
    )
    if "recorded" in report:
        figure.supxlabel(textwrap.fill(report["recorded"], 200), fontsize=8, color=_DARK)
    figure.savefig(path, dpi=160)


def _bars(axes: Any, figures: dict[str, float | None], *, form: str) -> None:
    for name, number in figures.items():
        if number is None:
            axes.text(_PLACES[name], 0, "n/a", ha="center", va="bottom", color=_DARK)
            continue
        axes.bar(_PLACES[name], number, width=0.82, color=_KINDS[name[1:]][1])
        axes.text(_PLACES[name], number, form.format(number), ha="center", va="bottom")
    axes.tick_params(axis="x", length=0)
    axes.set_xticks([_PLACES[name] for name in figures])
    axes.set_xticklabels([name[0] + _KINDS[name[1:]][0] for name in figures], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
