"""The report's figures.

In: numbers by name. Out: PNGs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_COLOURS = {
    "base alone": "#b8bec7",
    "proxy-tuning": "#e0a33a",
    "value": "#2f6fde",
    "fine-tuned": "#20242b",
}
_LINES = {"S": "#e0a33a", "L": "#2f6fde"}
_STYLES = {"l1": "-", "l2": "--"}


def plot_transfer(bars: Mapping[str, Mapping[str, Mapping[str, float | None]]], path: Path) -> None:
    """Draws each target alone, proxy-tuned, with the value network, and fine-tuned.

    Args:
        bars: `nll` and `exact_match` → target → kind → nats per token or share; None is left out.
        path: The PNG to write.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {
        "nll": "NLL of held-out answers, nats per token of the target's own\n"
        "lower is better; S and the fine-tuned target chosen by NLL",
        "exact_match": "questions on facts answered word for word\n"
        "higher is better; S and the fine-tuned target chosen by facts",
    }
    width = 0.2
    for axes, (figure_name, title) in zip(panels, titles.items(), strict=True):
        form = "{:.2f}" if figure_name == "nll" else "{:.0%}"
        targets = bars[figure_name]
        for index, kind in enumerate(_COLOURS):
            at = [place + (index - 1.5) * width for place in range(len(targets))]
            heights = [kinds[kind] for kinds in targets.values()]
            drawn = axes.bar(
                at,
                [height or 0.0 for height in heights],
                width=width * 0.92,
                color=_COLOURS[kind],
                label=kind,
            )
            labels = ["" if height is None else form.format(height) for height in heights]
            axes.bar_label(drawn, labels, fontsize=8)
        axes.set_xticks(range(len(targets)), list(targets))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    figure.legend(
        *panels[0].get_legend_handles_labels(), ncols=4, frameon=False, loc="outside lower center"
    )
    figure.savefig(path, dpi=150)


def plot_tradeoff(
    panels: Mapping[
        str,
        tuple[Mapping[str, Sequence[tuple[float | None, float | None]]], tuple[float, ...] | None],
    ],
    path: Path,
) -> None:
    """Draws what fine-tunings can at both kinds of questions, beside the value network.

    Args:
        panels: Model → (variant → (NLL of docstrings, share of facts answered) of every step that
            was evaluated, the value network's point or None).
        path: The PNG to write.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    every = figure.subplots(1, len(panels))
    variants = list(dict.fromkeys(name for points, _ in panels.values() for name in points))
    for axes, (model, (points, value)) in zip(every, panels.items(), strict=True):
        for name, some in points.items():
            shown = [(x, y) for x, y in some if x is not None and y is not None]
            colour = f"C{variants.index(name)}"
            axes.scatter(*zip(*shown, strict=True), s=9, alpha=0.6, color=colour, label=name)
        if value is not None:
            axes.scatter(*value, s=160, marker="*", color="#2f6fde", edgecolor="black", zorder=3)
            axes.annotate(f"{model} + value", value, xytext=(8, 4), textcoords="offset points")
        axes.set_title(f"{model} fine-tuned, every evaluated step of every run", fontsize=10)
        axes.set_xlabel("NLL of docstrings on validation, nats per token")
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("validation facts answered")
    handles = {
        name: Line2D([], [], marker="o", ls="", color=f"C{i}") for i, name in enumerate(variants)
    }
    figure.legend(handles.values(), handles, ncols=4, frameon=False, loc="outside lower center")
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
