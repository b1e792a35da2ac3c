"""Whether value networks help a base that they were not trained with, from a few dialogues.

In: a composed model, tokenised dialogues. Out: the gain per token with a confidence interval, where
it is gained and lost (by position in the answer, by the base's entropy, by what the base had right
already), and the strength that suits this base.

    gain of a token = log p_composed(token) − log p_base(token), nats
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from ivl_jax.data.tokenized import TokenizedDemonstrations
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.held_out import rows_of
from ivl_jax.evaluation.intervals import wilson_interval
from ivl_jax.evaluation.likelihood_report import shown
from ivl_jax.evaluation.resampling import percentile_interval, resample_ratios
from ivl_jax.evaluation.scoring import Row, RowScores, score_rows

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""What the given strengths are multiplied by; 0 is the base alone."""
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, math.inf)
"""Bounds of the groups by the base's entropy, nats."""
_FEW_ROWS = 5  # below this many rows with such tokens, a group has no interval
_NAMED = 5  # rows that lose most

Verdict = Literal["helps", "hurts", "unclear"]


class Tokens(NamedTuple):
    """The assistant's tokens that count, of all dialogues one after another."""

    row: Int[np.ndarray, " N"]  # the dialogue's index
    position: Int[np.ndarray, " N"]  # in its answer, from 0
    nll: Float64[np.ndarray, " N"]  # under the composition, nats
    base_nll: Float64[np.ndarray, " N"]
    entropy: Float64[np.ndarray, " N"]  # of the base's prediction, nats
    divergence: Float64[np.ndarray, " N"]  # KL(composed ‖ base), nats
    right: Bool[np.ndarray, " N"]  # the likeliest token under the composition
    base_right: Bool[np.ndarray, " N"]  # under the base alone

    @property
    def gain(self) -> Float64[np.ndarray, " N"]:
        """What the value networks add to the log-probability, nats."""
        return self.base_nll - self.nll


@dataclass(frozen=True)
class Gain:
    """The mean gain over a group of tokens."""

    tokens: int
    rows: int
    """Dialogues with such tokens."""
    gain: float | None
    """Nats per token; None without such tokens."""
    interval: tuple[float, float] | None
    """Of 95 %, from drawing dialogues anew; None with fewer than five."""
    base_nll: float | None
    """Nats per token."""


@dataclass(frozen=True)
class Strength:
    """NLL at one multiple of the given strengths."""

    factor: float
    nll: float
    """Nats per token."""
    gain_interval: tuple[float, float]
    """Of the gain over the base, 95 %."""


@dataclass(frozen=True)
class TransferReport:
    """What a few dialogues say about a base with value networks."""

    verdict: Verdict
    """Whether the interval of the gain is above 0, below 0, or neither."""
    overall: Gain
    rows_needed: int | None
    """About how many dialogues would tell, if these do not."""
    rows_helped: float
    """Share of dialogues whose mean gain is above 0."""
    rows_helped_interval: tuple[float, float]
    base_right: float
    """Share of tokens that are the base's likeliest."""
    right: float
    """The same of the composition."""
    kept: float | None
    """Of the tokens that the base had right, the share that the composition has right too."""
    corrected: float | None
    """Of the tokens that the base had wrong, the share that the composition has right."""
    divergence: float
    """Mean KL(composed ‖ base), nats."""
    by_position: tuple[tuple[int, int, Gain], ...]
    """(first position in the answer, end, gain)."""
    by_entropy: tuple[tuple[float, float, Gain], ...]
    """(lowest entropy of the base, end, gain)."""
    where_base_right: Gain
    where_base_wrong: Gain
    strengths: tuple[Strength, ...]
    """By factor, the base alone first."""
    suggested_factor: float
    """The factor with the lowest NLL; 1 if it is not reliably better than the given strengths."""
    suggested_interval: tuple[float, float]
    """95 % of the drawn sets of dialogues have their best factor in here."""
    row_gains: tuple[float, ...]
    """Mean gain of each dialogue that has counted tokens, in order."""
    row_base_nlls: tuple[float, ...]
    """Its NLL under the base alone."""
    worst: tuple[tuple[str, float], ...]
    """The dialogues that lose most: file and line, and mean gain."""

    def to_json(self) -> dict[str, Any]:
        """The content of the report's file."""
        return dataclasses.asdict(self) | {
            name: [
                {"from": low, "to": None if math.isinf(high) else high, **dataclasses.asdict(gain)}
                for low, high, gain in groups
            ]
            for name, groups in (("by_position", self.by_position), ("by_entropy", self.by_entropy))
        }


def transfer_report(
    model: ComposedModel, dialogues: TokenizedDemonstrations, *, batch_size: int
) -> TransferReport:
    """Score dialogues at several strengths and compare with the base alone.

    Args:
        model: the base with at least one value network, at the strengths to judge.
        dialogues: as `likelihood_report` takes them; about 50.
        batch_size: dialogues scored together.

    Returns:
        The report.

    Raises:
        ValueError: no value network, or no counted token.
    """
    if not model.values:
        raise ValueError("a transfer report compares value networks with their base: got none")
    rows = rows_of(model, dialogues)
    masks = [dialogues[index].loss_mask[1:] for index in range(len(dialogues))]
    if not any(mask.any() for mask in masks):
        raise ValueError("none of the dialogues has an assistant's token that counts")

    def score(factor: float, *, with_base: bool) -> list[RowScores]:
        scaled = dataclasses.replace(
            model, strengths=tuple(factor * strength for strength in model.strengths)
        )
        found = score_rows(scaled, rows, batch_size=batch_size, with_base=with_base)
        named = f"scoring at {factor:g} × the strength"
        return _in_order(dict(shown(found, len(rows), doing=named)), rows)

    tokens = collect(score(1.0, with_base=True), masks)
    nlls = {0.0: tokens.base_nll, 1.0: tokens.nll}
    for factor in FACTORS:
        if factor not in nlls:
            nlls[factor] = _nll(score(factor, with_base=False), masks)
    names = [dialogues.row_id(index) for index in range(len(dialogues))]
    return summarise(tokens, {factor: nlls[factor] for factor in sorted(nlls)}, names=names)


def collect(scores: Sequence[RowScores], masks: Sequence[Bool[np.ndarray, " _"]]) -> Tokens:
    """The counted tokens of scored dialogues.

    Args:
        scores: of each dialogue, with its base's.
        masks: which of its targets count.

    Returns:
        The tokens of all dialogues.
    """
    parts = []
    for index, (one, mask) in enumerate(zip(scores, masks, strict=True)):
        assert one.base is not None, "requested"
        parts.append(
            Tokens(
                row=np.full(int(mask.sum()), index),
                position=positions_in_answer(mask)[mask],
                nll=-np.asarray(one.tokens.log_prob[mask], np.float64),
                base_nll=-np.asarray(one.base.log_prob[mask], np.float64),
                entropy=np.asarray(one.base.entropy[mask], np.float64),
                divergence=np.asarray(one.base.divergence[mask], np.float64),
                right=np.asarray(one.tokens.largest[mask], bool),
                base_right=np.asarray(one.base.largest[mask], bool),
            )
        )
    return Tokens(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def positions_in_answer(mask: Bool[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
    """How many counted targets in a row come just before each target.

    >>> positions_in_answer(np.array([False, True, True, False, True])).tolist()
    [0, 0, 1, 0, 0]
    """
    counted = np.cumsum(mask)
    before = np.where(mask, 0, counted)
    return np.where(mask, counted - 1 - np.maximum.accumulate(before), 0)


def summarise(
    tokens: Tokens,
    nlls: dict[float, Float64[np.ndarray, " N"]],
    *,
    names: Sequence[str],
) -> TransferReport:
    """Turn scored tokens into a report.

    Args:
        tokens: of all dialogues.
        nlls: factor → NLL of the same tokens, in ascending order; has 0 and 1.
        names: of each dialogue.

    Returns:
        The report.
    """
    rows = len(names)

    def per_row(values: np.ndarray) -> np.ndarray:
        return np.bincount(tokens.row, np.asarray(values, np.float64), minlength=rows)

    def group(which: Bool[np.ndarray, " N"]) -> Gain:
        gains, counts = per_row(tokens.gain * which), per_row(which)
        there, total = counts > 0, int(counts.sum())
        if not total:
            return Gain(0, 0, None, None, None)
        interval = None
        if there.sum() >= _FEW_ROWS:
            drawn = resample_ratios(gains[there][:, None], counts[there][:, None])
            interval = percentile_interval(drawn[:, 0])
        base_nll = float(tokens.base_nll[which].sum() / total)
        return Gain(total, int(there.sum()), float(gains.sum() / total), interval, base_nll)

    everything = np.ones(len(tokens.row), bool)
    overall = group(everything)
    counts = per_row(everything)
    there = counts > 0
    row_gains = per_row(tokens.gain)[there] / counts[there]
    row_base_nlls = per_row(tokens.base_nll)[there] / counts[there]
    helped = int((row_gains > 0).sum())
    order = np.argsort(row_gains)[:_NAMED]
    kept_names = [name for name, counted in zip(names, there, strict=True) if counted]
    return TransferReport(
        verdict=_verdict(overall),
        overall=overall,
        rows_needed=_rows_needed(overall),
        rows_helped=helped / len(row_gains),
        rows_helped_interval=wilson_interval(helped, len(row_gains)),
        base_right=float(tokens.base_right.mean()),
        right=float(tokens.right.mean()),
        kept=_share(tokens.right, tokens.base_right),
        corrected=_share(tokens.right, ~tokens.base_right),
        divergence=float(tokens.divergence.mean()),
        by_position=_grouped(group, tokens.position, _position_bounds(tokens.position)),
        by_entropy=_grouped(group, tokens.entropy, ENTROPIES),
        where_base_right=group(tokens.base_right),
        where_base_wrong=group(~tokens.base_right),
        **_strengths(nlls, per_row, there),
        row_gains=tuple(row_gains.tolist()),
        row_base_nlls=tuple(row_base_nlls.tolist()),
        worst=tuple((kept_names[i], float(row_gains[i])) for i in order if row_gains[i] < 0),
    )


def _strengths(
    nlls: dict[float, np.ndarray], per_row: Callable[[np.ndarray], np.ndarray], there: np.ndarray
) -> dict[str, Any]:
    """NLL by factor, the best factor, and how far it is certain."""
    factors = np.asarray(list(nlls))
    sums = np.stack([per_row(each)[there] for each in nlls.values()], axis=1)
    counts = np.broadcast_to(per_row(np.ones_like(nlls[0.0]))[there][:, None], sums.shape)
    drawn, means = resample_ratios(sums, counts), sums.sum(axis=0) / counts.sum(axis=0)
    base, given, best = 0, int(np.flatnonzero(factors == 1.0)[0]), int(means.argmin())
    surely_better = percentile_interval(drawn[:, given] - drawn[:, best])[0] > 0
    return {
        "strengths": tuple(
            Strength(
                float(factor),
                float(means[index]),
                percentile_interval(drawn[:, base] - drawn[:, index]),
            )
            for index, factor in enumerate(factors)
        ),
        "suggested_factor": float(factors[best]) if surely_better else 1.0,
        "suggested_interval": percentile_interval(factors[drawn.argmin(axis=1)]),
    }


def _grouped(
    group: Callable[[np.ndarray], Gain], values: np.ndarray, bounds: Sequence[int | float]
) -> tuple[tuple[Any, Any, Gain], ...]:
    return tuple(
        (low, high, group((values >= low) & (values < high)))
        for low, high in itertools.pairwise(bounds)
    )


def _position_bounds(positions: np.ndarray) -> list[int]:
    """0, 1, 2, 4, 8, … beyond the last position: the first tokens of an answer matter most."""
    bounds = [0, 1, 2]
    while bounds[-1] <= positions.max():
        bounds.append(2 * bounds[-1])
    return bounds


def _verdict(overall: Gain) -> Verdict:
    if overall.interval is None:
        return "unclear"
    low, high = overall.interval
    return "helps" if low > 0 else "hurts" if high < 0 else "unclear"


def _rows_needed(overall: Gain) -> int | None:
    """Half the interval shrinks with the root of the number of dialogues."""
    if _verdict(overall) != "unclear" or overall.interval is None or not overall.gain:
        return None
    half = (overall.interval[1] - overall.interval[0]) / 2
    return math.ceil(overall.rows * (half / abs(overall.gain)) ** 2)


def _share(right: np.ndarray, among: np.ndarray) -> float | None:
    return float(right[among].mean()) if among.any() else None


def _nll(scores: Sequence[RowScores], masks: Sequence[np.ndarray]) -> Float64[np.ndarray, " N"]:
    parts = [-one.tokens.log_prob[mask] for one, mask in zip(scores, masks, strict=True)]
    return np.concatenate(parts).astype(np.float64)


def _in_order(found: dict[int, RowScores], rows: Sequence[Row]) -> list[RowScores]:
    return [found[index] for index in range(len(rows))]
