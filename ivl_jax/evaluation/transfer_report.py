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
from ivl_jax.evaluation.held_out import first_copies, rows_of
from ivl_jax.evaluation.intervals import wilson_interval
from ivl_jax.evaluation.likelihood_report import shown
from ivl_jax.evaluation.resampling import (
    percentile_interval,
    reliably_above,
    resample_ratios,
)
from ivl_jax.evaluation.scoring import Row, RowScores, score_rows

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""What the given strengths are multiplied by; 0 is the base alone."""
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, math.inf)
"""Bounds of the groups by the base's entropy, nats."""
FEWEST_ROWS = 5
"""With fewer different dialogues there is no interval, and nothing is called reliable."""
_NAMED = 5  # rows that lose most

Verdict = Literal["helps", "hurts", "unclear"]


class Tokens(NamedTuple):
    """The assistant's tokens that count, of all dialogues one after another."""

    row: Int[np.ndarray, " N"]  # the dialogue's index; copies of a dialogue share one
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
    """Different dialogues with such tokens."""
    gain: float | None
    """Nats per token; None without such tokens."""
    interval: tuple[float, float] | None
    """Of 95 %, from drawing different dialogues anew; None with fewer than five."""
    base_nll: float | None
    """Nats per token."""


@dataclass(frozen=True)
class Strength:
    """NLL at one multiple of the given strengths."""

    factor: float
    nll: float
    """Nats per token."""
    gain: float
    """Over the base, nats per token."""
    gain_interval: tuple[float, float] | None
    """Of 95 %, for this strength alone; None with fewer than five dialogues."""


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
    rows_helped_interval: tuple[float, float] | None
    """Of 95 % (Wilson); None with fewer than five dialogues."""
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
    """Of the factors that are reliably better than the given strengths, allowing for the choice
    among all of them, the one with the lowest NLL; 1 if there is none. If the given strengths hurt,
    0 unless another factor is also reliably better than the base."""
    suggested_interval: tuple[float, float] | None
    """95 % of the drawn sets of dialogues have their best factor in here; None with fewer than
    five."""
    row_names: tuple[str, ...]
    """File and line of each different dialogue that has counted tokens, in order."""
    row_gains: tuple[float, ...]
    """Mean gain of each."""
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
    # Copies tell no more than one of them: together they are drawn as one dialogue.
    distinct, row = np.unique(first_copies(dialogues), return_inverse=True)
    tokens = tokens._replace(row=row[tokens.row])
    names = [dialogues.row_id(int(index)) for index in distinct]
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
        names: of each different dialogue.

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
        if there.sum() >= FEWEST_ROWS:
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
        rows_helped_interval=wilson_interval(helped, overall.rows) if overall.interval else None,
        base_right=float(tokens.base_right.mean()),
        right=float(tokens.right.mean()),
        kept=_share(tokens.right, tokens.base_right),
        corrected=_share(tokens.right, ~tokens.base_right),
        divergence=float(tokens.divergence.mean()),
        by_position=_grouped(group, tokens.position, _position_bounds(tokens.position)),
        by_entropy=_grouped(group, tokens.entropy, ENTROPIES),
        where_base_right=group(tokens.base_right),
        where_base_wrong=group(~tokens.base_right),
        **_strengths(nlls, per_row, there, hurts=_verdict(overall) == "hurts"),
        row_names=tuple(kept_names),
        row_gains=tuple(row_gains.tolist()),
        row_base_nlls=tuple(row_base_nlls.tolist()),
        worst=tuple((kept_names[i], float(row_gains[i])) for i in order if row_gains[i] < 0),
    )


def _strengths(
    nlls: dict[float, np.ndarray],
    per_row: Callable[[np.ndarray], np.ndarray],
    there: np.ndarray,
    *,
    hurts: bool,
) -> dict[str, Any]:
    """NLL by factor, the best factor, and how far it is certain."""
    factors = np.asarray(list(nlls))
    sums = np.stack([per_row(each)[there] for each in nlls.values()], axis=1)
    counts = np.broadcast_to(per_row(np.ones_like(nlls[0.0]))[there][:, None], sums.shape)
    means = sums.sum(axis=0) / counts.sum(axis=0)
    gains = (means[0] - means).tolist()
    if len(sums) < FEWEST_ROWS:
        found = zip(factors.tolist(), means.tolist(), gains, [None] * len(factors), strict=True)
        curve = tuple(Strength(*one) for one in found)
        return {"strengths": curve, "suggested_factor": 1.0, "suggested_interval": None}
    drawn = resample_ratios(sums, counts)

    def better(than: int) -> np.ndarray:
        return reliably_above(drawn[:, [than]] - drawn, means[than] - means)

    base, given = 0, int(np.flatnonzero(factors == 1.0)[0])
    good = better(given)
    if hurts:
        good &= better(base)
        good[base] = True
    best = int(np.where(good, means, np.inf).argmin()) if good.any() else given
    return {
        "strengths": tuple(
            Strength(
                float(factor),
                float(means[index]),
                gains[index],
                percentile_interval(drawn[:, base] - drawn[:, index]),
            )
            for index, factor in enumerate(factors)
        ),
        "suggested_factor": float(factors[best]),
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
    """The interval shrinks with the root of the number of dialogues; the end at 0 decides."""
    if _verdict(overall) != "unclear" or overall.interval is None or not overall.gain:
        return None
    low, high = overall.interval
    arm = overall.gain - low if overall.gain > 0 else high - overall.gain
    needed = math.ceil(overall.rows * (arm / abs(overall.gain)) ** 2)
    return max(needed, overall.rows + 1)


def _share(right: np.ndarray, among: np.ndarray) -> float | None:
    return float(right[among].mean()) if among.any() else None


def _nll(scores: Sequence[RowScores], masks: Sequence[np.ndarray]) -> Float64[np.ndarray, " N"]:
    parts = [-one.tokens.log_prob[mask] for one, mask in zip(scores, masks, strict=True)]
    return np.concatenate(parts).astype(np.float64)


def _in_order(found: dict[int, RowScores], rows: Sequence[Row]) -> list[RowScores]:
    return [found[index] for index in range(len(rows))]
