"""What value networks change on held-out dialogues, and at which positions.

In: a composed model, tokenised dialogues. Out: NLL and top-1 accuracy of composition and base, the
divergence between the two and mean |z_value|, overall and by position in the dialogue.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ivl_jax.data.tokenized import TokenizedDemonstrations
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.held_out import rows_of
from ivl_jax.evaluation.scoring import RowScores, score_rows

_FIRST_EDGE = 16


@dataclass(frozen=True)
class Figures:
    """Figures over a set of positions; means over no targets are None.

    Attributes:
        targets: Number of assistant's tokens that count.
        tokens: Number of tokens read after which the value networks make a prediction.
        nll: Mean −log p of a target, in nats.
        base_nll: The same for the base alone.
        top1: Share of targets with the largest logit, 0 to 1.
        base_top1: The same for the base alone.
        kl_from_base: Mean KL(composed ‖ base) at positions that predict a target, in nats.
        mean_abs_value: Mean |z_value| over the tokens read and the vocabulary, per value network,
            before its strength.
    """

    targets: int
    tokens: int
    nll: float | None
    base_nll: float | None
    top1: float | None
    base_top1: float | None
    kl_from_base: float | None
    mean_abs_value: tuple[float, ...]


@dataclass(frozen=True)
class LikelihoodReport:
    """Figures of all positions, and of positions 0 to 15, 16 to 31, 32 to 63, … of a dialogue."""

    overall: Figures
    by_position: tuple[tuple[int, int, Figures], ...]
    """(first position, end, figures); positions are of the token read."""

    def to_json(self) -> dict[str, Any]:
        """The content of the report's file."""
        return dataclasses.asdict(self.overall) | {
            "by_position": [
                {"from": start, "to": end, **dataclasses.asdict(figures)}
                for start, end, figures in self.by_position
            ]
        }


class _Sums:
    """Sums over positions, one column per bin of positions."""

    def __init__(self, values: int) -> None:
        names = ("targets", "tokens", "nll", "base_nll", "top1", "base_top1", "kl_from_base")
        # 64 doublings of 16 positions: no dialogue is longer.
        self.sums = {name: np.zeros(64) for name in names}
        self.magnitude = np.zeros((64, values))

    def add(self, scores: RowScores, counted: np.ndarray) -> None:
        """Add one dialogue; `counted` marks the targets that count."""
        assert scores.base is not None
        bins, magnitude = _bins(len(counted)), scores.base.magnitude
        for name, values in {
            "targets": np.ones(len(counted)),
            "nll": -scores.tokens.log_prob,
            "base_nll": -scores.base.log_prob,
            "top1": scores.tokens.largest,
            "base_top1": scores.base.largest,
            "kl_from_base": scores.base.divergence,
        }.items():
            np.add.at(self.sums[name], bins[counted], np.asarray(values[counted], np.float64))
        # A value network with its own vocabulary makes no predictions within a prompt.
        known = ~np.isnan(magnitude).any(axis=1)
        np.add.at(self.sums["tokens"], bins[known], 1.0)
        np.add.at(self.magnitude, bins[known], np.asarray(magnitude[known], np.float64))

    def figures(self, which: slice) -> Figures:
        """The means over some bins."""
        total = {name: float(values[which].sum()) for name, values in self.sums.items()}
        targets, tokens = total.pop("targets"), total.pop("tokens")
        means = {name: value / targets if targets else None for name, value in total.items()}
        magnitude = self.magnitude[which].sum(axis=0) / max(tokens, 1.0)
        return Figures(int(targets), int(tokens), **means, mean_abs_value=tuple(magnitude.tolist()))


def likelihood_report(
    model: ComposedModel, dialogues: TokenizedDemonstrations, *, batch_size: int
) -> LikelihoodReport:
    """Score dialogues and sum their figures.

    Args:
        model: the model that scores them.
        dialogues: in the base's tokens, in the model's own chat format if a value network has its
            own vocabulary; at most the context plus one tokens each.
        batch_size: dialogues scored together.

    Returns:
        The report; sums are added in float64.
    """
    encoded = [dialogues[index] for index in range(len(dialogues))]
    rows = rows_of(model, dialogues)
    scored = score_rows(model, rows, batch_size=batch_size, with_base=True)
    sums, longest = _Sums(len(model.values)), 0
    for index, scores in shown(scored, len(rows)):
        sums.add(scores, encoded[index].loss_mask[1:])
        longest = max(longest, len(rows[index].token_ids) - 1)
    edges = [0, _FIRST_EDGE]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return LikelihoodReport(
        overall=sums.figures(slice(None)),
        by_position=tuple(
            (start, end, sums.figures(slice(place, place + 1)))
            for place, (start, end) in enumerate(itertools.pairwise(edges))
        ),
    )


def show(report: LikelihoodReport, model: ComposedModel, console: Console) -> None:
    """Print the report as a table.

    Args:
        report: the report.
        model: the model that it describes.
        console: where to print.
    """
    table = Table(title="Assistant's tokens, by position in the dialogue")
    magnitudes = [f"|z_value {index + 1}|" for index in range(len(model.values))]
    for heading in ("position", "targets", "NLL", "base NLL", "top-1", "base top-1", "KL"):
        table.add_column(heading, justify="right")
    for heading in magnitudes:
        table.add_column(heading, justify="right")
    rows = [(f"{start}–{end - 1}", figures) for start, end, figures in report.by_position]
    for name, figures in (*rows, ("all", report.overall)):
        table.add_row(
            name,
            str(figures.targets),
            *(_cell(value, ".3f") for value in (figures.nll, figures.base_nll)),
            *(_cell(value, ".1%") for value in (figures.top1, figures.base_top1)),
            _cell(figures.kl_from_base, ".3f"),
            *(f"{value:.3f}" for value in figures.mean_abs_value),
            end_section=name == (rows[-1][0] if rows else None),
        )
    console.print(table)
    console.print("NLL and KL(composed ‖ base): nats per target. |z_value|: mean over tokens read.")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bins(length: int) -> np.ndarray:
    """The bin of each position: 0 below 16, 1 below 32, 2 below 64, and so on."""
    positions = np.arange(length) // _FIRST_EDGE
    return np.where(positions > 0, np.floor(np.log2(np.maximum(positions, 1))) + 1, 0).astype(int)


def shown(scored: Iterable[Any], total: int, *, doing: str = "scoring") -> Iterable[Any]:
    """The same, with a progress bar on standard error if it is a terminal."""
    console = Console(stderr=True)
    return track(scored, doing, total=total, console=console, disable=not console.is_terminal)
