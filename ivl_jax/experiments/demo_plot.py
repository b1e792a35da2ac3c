"""The demo's figure: what the value network does to the base it was trained on, and to another.

In: the demo's report. Out: a PNG.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_GREY, _BLUE, _DARK = "#b8bec7", "#2f6fde", "#20242b"
_COLOURS = {"S": _GREY, "S+value": _BLUE, "L": _GREY, "L+value": _BLUE, "L-finetuned": _DARK}
_LABELS = {"S+value": "S + value", "L+value": "L + value", "L-finetuned": "L fully\nfine-tuned"}
# Where the bars stand: what belongs to S, a gap, what belongs to L.
_PLACES = {"S": 0.0, "S+value": 1.0, "L": 2.5, "L+value": 3.5, "L-finetuned": 4.5}


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Draws response NLL and exact match of every model side by side.

    Args:
        report: `nll` and `exact_match` (name → number or None) and `transfer_ratio`.
        path: The PNG to write.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, report["nll"], form="{:.2f}")
    left.set_title("Response NLL, nats per token (lower is better)", fontsize=10)
    _bars(right, report["exact_match"], form="{:.0%}")
    right.set_title("Facts answered word for word (higher is better)", fontsize=10)
    right.set_ylim(0, 1.08)
    ratio = report["transfer_ratio"]["L"]
    gain = "" if ratio is None else f": {ratio:.0%} of the gain of fine-tuning L itself"
    figure.suptitle(
        f"A value network trained on S (0.7 M parameters), put on L (6.2 M){gain}",
        fontsize=12,
        fontweight="bold",
    )
    figure.savefig(path, dpi=160)


def _bars(axes: Any, figures: dict[str, float | None], *, form: str) -> None:
    for name, number in figures.items():
        if number is None:
            axes.text(_PLACES[name], 0, "n/a", ha="center", va="bottom", color=_DARK)
            continue
        axes.bar(_PLACES[name], number, width=0.82, color=_COLOURS[name])
        axes.text(_PLACES[name], number, form.format(number), ha="center", va="bottom")
    axes.set_xticks([_PLACES[name] for name in figures])
    axes.set_xticklabels([_LABELS.get(name, name) for name in figures])
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
