"""The report's figures.

In: numbers by name. Out: PNGs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_COLOURS = {
    "base alone": "#b8bec7",
    "proxy-tuning": "#e0a33a",
    "value": "#2f6fde",
    "fine-tuned": "#20242b",
}
_LINES = {"S": "#e0a33a", "L": "#2f6fde"}
_STYLES = {"l1": "-", "l2": "--"}


def plot_transfer(bars: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """Draws each target's NLL alone, proxy-tuned, with the value network, and fine-tuned.

    Args:
        bars: Target → kind → nats per token; None is left out.
        path: The PNG to write.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.2
    for index, kind in enumerate(_COLOURS):
        at = [place + (index - 1.5) * width for place in range(len(bars))]
        heights = [kinds[kind] or 0.0 for kinds in bars.values()]
        drawn = axes.bar(at, heights, width=width * 0.92, color=_COLOURS[kind], label=kind)
        labels = [f"{height:.2f}" if height else "" for height in heights]
        axes.bar_label(drawn, labels, fontsize=8)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("response NLL, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.2)
    axes.legend(ncols=4, frameon=False, loc="upper center")
    figure.savefig(path, dpi=150)


def plot_penalties(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path
) -> None:
    """Draws NLL on each base against λ.

    Args:
        curves: Base → penalty kind → (λ, nats per token).
        path: The PNG to write.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (base, kinds) in zip(figure.subplots(1, 2), _both(curves).items(), strict=True):
        for kind, points in kinds.items():
            axes.plot(
                *zip(*points, strict=True),
                _STYLES[kind],
                marker="o",
                color=_LINES[base],
                label=kind.upper(),
            )
        axes.set_xscale("symlog", linthresh=0.03)
        axes.set_title(f"on {base}", fontsize=10)
        axes.set_xlabel("λ")
        axes.set_ylabel("response NLL, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        if kinds:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_strengths(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draws NLL against the strength α.

    Args:
        curves: Base → (α, nats per token).
        path: The PNG to write.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for base, points in curves.items():
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                color=_LINES[base],
                label=f"{base} + α·value",
            )
    axes.set_xlabel("strength α")
    axes.set_ylabel("response NLL, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _both(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Mapping:
    return {base: curves.get(base, {}) for base in ("S", "L")}
