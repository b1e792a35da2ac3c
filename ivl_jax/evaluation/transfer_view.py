"""The transfer report for people: tables on the console, and a figure.

In: a `TransferReport`. Out: text, a PNG.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ivl_jax.evaluation.calibration import CalibrationReport
from ivl_jax.evaluation.transfer_report import Gain, TransferReport

_GAIN, _LOSS, _GREY = "#2f6fde", "#c8503c", "#8a919c"
_SAID = {
    "helps": "The value network helps this base",
    "hurts": "The value network hurts this base",
    "unclear": "These dialogues do not tell whether the value network helps this base",
}


def headline(report: TransferReport) -> str:
    """One sentence: whether it helps, by how much, and how sure that is."""
    overall = report.overall
    said = f"{_SAID[report.verdict]}: {_number(overall.gain)} nats per token"
    if overall.interval is not None:
        low, high = overall.interval
        said += f", 95 % in [{low:+.3f}, {high:+.3f}]"
    said += f" ({overall.rows} dialogues, {overall.tokens} tokens)."
    if report.verdict == "unclear":
        more = report.rows_needed
        said += f" About {more} dialogues would tell." if more else " Give more dialogues."
    return said


def advice(report: TransferReport, strengths: Sequence[float]) -> str:
    """What strength to use.

    Args:
        report: the report.
        strengths: those that it was made at, one per value network.

    Returns:
        A sentence with the flags.
    """
    factor, (low, high) = report.suggested_factor, report.suggested_interval
    flags = " ".join(f"--strength {factor * strength:g}" for strength in strengths)
    between = f"{low:g} × the given strength" if low == high else f"{low:g} to {high:g} × it"
    if factor == 1:
        why = "no other of those tried is reliably better"
    elif factor == 0:
        why = "the base alone is reliably better than any"
    else:
        why = f"reliably better than the given one; the best is at {between} in 95 % of draws"
    return f"Strength: {flags} ({why})."


def show(report: TransferReport, strengths: Sequence[float], console: Console) -> None:
    """Print the report.

    Args:
        report: the report.
        strengths: that it was made at, one per value network.
        console: where to print.
    """
    console.print(headline(report))
    table = Table(title="Where it helps and where it hurts")
    for heading in ("tokens", "count", "base NLL", "gain", "95 %"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    groups = [
        *((_position(low, high), gain) for low, high, gain in report.by_position),
        *((_entropy(low, high), gain) for low, high, gain in report.by_entropy),
        ("the base has it right", report.where_base_right),
        ("the base has it wrong", report.where_base_wrong),
    ]
    ends = {len(report.by_position) - 1, len(report.by_position) + len(report.by_entropy) - 1}
    for index, (name, gain) in enumerate(groups):
        interval = gain.interval
        table.add_row(
            name,
            str(gain.tokens),
            "" if gain.base_nll is None else f"{gain.base_nll:.3f}",
            _number(gain.gain),
            "" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
            end_section=index in ends,
        )
    console.print(table)
    console.print("gain: log p(composition) − log p(base), nats per token; base NLL likewise.")
    low, high = report.rows_helped_interval
    console.print(
        f"Dialogues that gain: {report.rows_helped:.0%} ({low:.0%} to {high:.0%}). Likeliest token "
        f"right: {report.right:.1%}, base alone {report.base_right:.1%}; of what the base has "
        f"right {_percent(report.kept)} stay right, of what it has wrong "
        f"{_percent(report.corrected)} become right. KL from the base: {report.divergence:.3f} "
        "nats per token."
    )
    curve = Table(title="Strength")
    for heading in ("× given", "NLL", "gain, 95 %"):
        curve.add_column(heading, justify="right")
    for one in report.strengths:
        interval = "" if not one.factor else "{:+.3f} to {:+.3f}".format(*one.gain_interval)
        curve.add_row(f"{one.factor:g}", f"{one.nll:.3f}", interval)
    console.print(curve)
    console.print(advice(report, strengths))
    if report.worst:
        console.print("Dialogues that lose most, nats per token:")
        for name, gain in report.worst:
            console.print(f"  {gain:+.3f}  {name}", highlight=False)


def show_calibration(fit: CalibrationReport, console: Console) -> None:
    """Print a calibration.

    Args:
        fit: strengths, temperature and what they are worth.
        console: where to print.
    """
    flags = " ".join(f"--strength {strength:.3g}" for strength in fit.strengths)
    console.print(
        f"Calibration: {flags}, temperature {fit.temperature:.3g}: held-out NLL {fit.nll:.3f} "
        f"instead of {fit.given_nll:.3f} nats per token (each half of the dialogues as fitted to "
        "the other; the temperature changes no greedy answer)."
    )


def plot(report: TransferReport, path: Path) -> None:
    """Draw the gain by position and entropy, the NLL by strength, and each dialogue.

    Args:
        report: the report.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    (by_position, by_entropy), (curve, rows) = figure.subplots(2, 2)
    _bars(by_position, [(_places(*each[:2]), each[2]) for each in report.by_position])
    by_position.set_title("Gain by position in the answer", fontsize=10)
    by_position.set_xlabel("token of the answer, from 0; below it, how many tokens")
    _bars(by_entropy, [(_bounds(*each[:2]), each[2]) for each in report.by_entropy])
    by_entropy.set_title("Gain by how unsure the base is", fontsize=10)
    by_entropy.set_xlabel("entropy of the base's prediction, nats; below it, how many tokens")
    _strength_curve(curve, report)
    colours = [_GAIN if gain > 0 else _LOSS for gain in report.row_gains]
    rows.axhline(0, color=_GREY, linewidth=0.8)
    rows.scatter(report.row_base_nlls, report.row_gains, s=18, c=colours, alpha=0.7)
    rows.set_title(
        f"Each dialogue: {report.rows_helped:.0%} of {len(report.row_gains)} gain", fontsize=10
    )
    rows.set_xlabel("NLL under the base alone, nats per token")
    rows.set_ylabel("gain, nats per token")
    for axes in (by_position, by_entropy, curve, rows):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(headline(report), fontsize=11, fontweight="bold", wrap=True)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, groups: Sequence[tuple[str, Gain]]) -> None:
    for place, (_, one) in enumerate(groups):
        if one.gain is None:
            continue
        error = None
        if one.interval is not None:
            low, high = one.interval
            error = [[max(one.gain - low, 0.0)], [max(high - one.gain, 0.0)]]
        colour = _GAIN if one.gain > 0 else _LOSS
        axes.bar(place, one.gain, width=0.75, color=colour, yerr=error, ecolor=_GREY, capsize=3)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    labels = [f"{name}\n({one.tokens})" for name, one in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylabel("gain, nats per token")


def _strength_curve(axes: Any, report: TransferReport) -> None:
    factors = [one.factor for one in report.strengths]
    base_nll = report.strengths[0].nll
    low = [base_nll - one.gain_interval[1] for one in report.strengths]
    high = [base_nll - one.gain_interval[0] for one in report.strengths]
    axes.fill_between(factors, low, high, color=_GAIN, alpha=0.15, linewidth=0)
    axes.plot(factors, [one.nll for one in report.strengths], color=_GAIN, marker="o", markersize=4)
    axes.axhline(base_nll, color=_GREY, linewidth=0.8, linestyle="--")
    axes.annotate(
        "base alone", (factors[0], base_nll), ha="left", va="bottom", fontsize=8, color=_GREY
    )
    axes.axvline(report.suggested_factor, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_title(f"Strength: {report.suggested_factor:g} × the given one suggested", fontsize=10)
    axes.set_xlabel("× the given strength")
    axes.set_ylabel("NLL, nats per token")


def _position(low: int, high: int) -> str:
    return f"{'token' if high == low + 1 else 'tokens'} {_places(low, high)}"


def _places(low: int, high: int) -> str:
    return str(low) if high == low + 1 else f"{low}–{high - 1}"


def _entropy(low: float, high: float) -> str:
    return f"base entropy {_bounds(low, high)}"


def _bounds(low: float, high: float) -> str:
    return f"≥ {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
