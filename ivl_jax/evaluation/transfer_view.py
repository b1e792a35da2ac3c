"""The transfer report for people: tables on the console, and a figure.

In: a `TransferReport`. Out: text, a PNG.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from ivl_jax.evaluation.calibration import CalibrationReport
from ivl_jax.evaluation.transfer_report import FEWEST_ROWS, Gain, TransferReport
from ivl_jax.paths import write_atomically

_GAIN, _LOSS, _GREY, _BAR = "#2f6fde", "#c8503c", "#8a919c", "#3b4049"
_LONGEST_NAME = 40  # characters, in a title


def headline(report: TransferReport, *, values: int = 1) -> str:
    """One sentence: whether it helps, by how much, and how sure that is.

    Args:
        report: the report.
        values: the number of value networks.
    """
    overall, several = report.overall, values > 1
    subject = "value networks" if several else "value network"
    help_, hurt = ("help", "hurt") if several else ("helps", "hurts")
    said = {
        "helps": f"The {subject} {help_} this base",
        "hurts": f"The {subject} {hurt} this base",
        "unclear": f"These dialogues do not tell whether the {subject} {help_} this base",
    }[report.verdict]
    said += f": {_number(overall.gain)} nats per token"
    if overall.interval is not None:
        low, high = overall.interval
        said += f", 95 % in [{low:+.3f}, {high:+.3f}]"
    said += f" ({_counted(overall.rows, 'dialogue')}, {_counted(overall.tokens, 'token')})."
    if overall.interval is None:
        said += f" An interval needs at least {FEWEST_ROWS} different dialogues."
    elif report.verdict == "unclear":
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
    factor, interval = report.suggested_factor, report.suggested_interval
    flags = " ".join(f"--strength {factor * strength:g}" for strength in strengths)
    if interval is None:
        why = "the given one: too few dialogues to compare others with it"
    elif factor == 1:
        why = "the given one: no other of those tried is reliably better"
    elif factor == 0:
        why = (
            "the base alone is reliably better than the given one, and no other of those tried is "
            "reliably better than the base"
        )
    else:
        low, high = interval
        between = f"{low:g} × it" if low == high else f"{low:g} to {high:g} × it"
        why = (
            "reliably better than the given one, with the lowest NLL on these dialogues of those "
            f"that are; the best is at {between} in 95 % of draws"
        )
    return f"Strength: {flags} ({why})."


def show(report: TransferReport, strengths: Sequence[float], console: Console) -> None:
    """Print the report.

    Args:
        report: the report.
        strengths: that it was made at, one per value network.
        console: where to print.
    """
    console.print(headline(report, values=len(strengths)))
    certain = report.overall.interval is not None
    table = Table(title="Where it helps and where it hurts")
    for heading in ("tokens", "count", "base NLL", "gain", *(["95 %"] if certain else [])):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    groups = [
        *((_position(low, high), gain) for low, high, gain in report.by_position),
        *((_entropy(low, high), gain) for low, high, gain in report.by_entropy),
        ("the base has it right", report.where_base_right),
        ("the base has it wrong", report.where_base_wrong),
    ]
    ends = {len(report.by_position) - 1, len(report.by_position) + len(report.by_entropy) - 1}
    for index, (name, gain) in enumerate(groups):
        table.add_row(
            name,
            str(gain.tokens),
            "" if gain.base_nll is None else f"{gain.base_nll:.3f}",
            _number(gain.gain),
            *([_interval(gain.interval)] if certain else []),
            end_section=index in ends,
        )
    console.print(table)
    console.print("gain: log p(composition) − log p(base), nats per token; base NLL likewise.")
    helped = f"{report.rows_helped:.0%}"
    if report.rows_helped_interval is not None:
        low, high = report.rows_helped_interval
        helped += f" ({low:.0%} to {high:.0%})"
    console.print(
        f"Dialogues that gain: {helped}. Likeliest token right: {report.right:.1%}, base alone "
        f"{report.base_right:.1%}; of what the base has right {_percent(report.kept)} stay right, "
        f"of what it has wrong {_percent(report.corrected)} become right. KL from the base: "
        f"{report.divergence:.3f} nats per token."
    )
    curve = Table(title="Strength")
    for heading in ("× given", "NLL", "gain", *(["95 %"] if certain else [])):
        curve.add_column(heading, justify="right")
    for one in report.strengths:
        interval = _interval(one.gain_interval) if one.factor else ""
        gain = _number(one.gain) if one.factor else ""
        cells = (f"{one.factor:g}", f"{one.nll:.3f}", gain)
        curve.add_row(*cells, *([interval] if certain else []))
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
    said = (
        f"Calibration: {flags}, temperature {fit.temperature:.3g}: held-out NLL {fit.nll:.3f} "
        f"instead of {fit.given_nll:.3f} nats per token (each half of the dialogues as fitted to "
        "the other; the temperature changes no greedy answer)."
    )
    if fit.nll >= fit.given_nll:
        said += " It is no better on unseen dialogues: keep the given strength."
    console.print(said)


def plot(report: TransferReport, path: Path, *, base: str, values: Sequence[str]) -> None:
    """Draw the gain by position, entropy and strength, and each dialogue.

    Args:
        report: the report.
        path: the PNG to write; at every moment it has either the old figure or the new one.
        base: the base's name.
        values: the value networks' names.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
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
    title = f"{_short(base)} with {' and '.join(map(_short, values))}"
    said = textwrap.fill(headline(report, values=len(values)), 110)
    figure.suptitle(f"{title}\n{said}", fontsize=11, fontweight="bold")
    handles: list[Any] = [
        Patch(color=_GAIN, label="gain: likelier than under the base"),
        Patch(color=_LOSS, label="loss: less likely"),
    ]
    if report.overall.interval is not None:
        handles += [
            Line2D([], [], color=_BAR, marker="|", markersize=9, label="bars: 95 % interval"),
            Patch(color=_GAIN, alpha=0.15, label="band: 95 % interval"),
        ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    write_atomically(path, image.getvalue())


def _bars(axes: Any, groups: Sequence[tuple[str, Gain]]) -> None:
    for place, (_, one) in enumerate(groups):
        if one.gain is None:
            continue
        error = None
        if one.interval is not None:
            low, high = one.interval
            error = [[max(one.gain - low, 0.0)], [max(high - one.gain, 0.0)]]
        colour = _GAIN if one.gain > 0 else _LOSS
        axes.bar(place, one.gain, width=0.75, color=colour, yerr=error, ecolor=_BAR, capsize=3)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    labels = [f"{name}\n({one.tokens})" for name, one in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylabel("gain, nats per token")


def _strength_curve(axes: Any, report: TransferReport) -> None:
    factors = [one.factor for one in report.strengths]
    intervals = [one.gain_interval for one in report.strengths if one.gain_interval]
    if intervals:
        axes.fill_between(factors, *zip(*intervals, strict=True), color=_GAIN, alpha=0.15, lw=0)
    gains = [one.gain for one in report.strengths]
    axes.plot(factors, gains, color=_GAIN, marker="o", markersize=4)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    suggested = report.suggested_factor
    if suggested == 1:
        said = "keep the given one"
    else:
        said = "the base alone" if suggested == 0 else f"{suggested:g} × the given one"
        said += " is reliably better (dotted line)"
        axes.axvline(suggested, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_title(f"Gain by strength: {said}", fontsize=10)
    axes.set_xlabel("× the given strength; 0 is the base alone")
    axes.set_ylabel("gain, nats per token")


def _position(low: int, high: int) -> str:
    return f"{'token' if high == low + 1 else 'tokens'} {_places(low, high)}"


def _places(low: int, high: int) -> str:
    return str(low) if high == low + 1 else f"{low}–{high - 1}"


def _entropy(low: float, high: float) -> str:
    return f"base entropy {_bounds(low, high)}"


def _bounds(low: float, high: float) -> str:
    return f"≥ {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(name: str) -> str:
    """A model's name; of a long path the end."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
