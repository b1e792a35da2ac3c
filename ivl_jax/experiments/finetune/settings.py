"""What a fine-tuning of a reference may vary, and which settings a bracketed search tries next.

In: settings that have been tried, with their validation curves. Out: the settings that are missing
before the best one is enclosed on both sides. Pure functions; nothing is trained here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Model = Literal["S", "L", "X", "L-continued", "XL", "real"]
"""`real`: one that is not of the family."""
Kinds = Literal["facts", "docstrings", "both", "all"]
"""`both` are facts and docstrings; `all`: whatever there is, chosen by NLL alone."""
Criterion = Literal["nll", "exact_match"]

# Each is about three times the one before.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LENGTHS = (1.0, 3.0, 10.0, 30.0)
# A run whose best step is later than this share of its steps may have been too short, and one whose
# best step is earlier than that too long: a schedule that ends there would have decayed its rate.
_TOO_SHORT, _TOO_LONG = 0.75, 0.5
# A run that is three times as long and gains less is long enough: nats per token, share of facts.
_WORTH_IT: Mapping[Criterion, float] = {"nll": 0.02, "exact_match": 0.02}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One fine-tuning; what it does not name is as in the demo's config."""

    model: Model
    kinds: Kinds
    """The demonstrations that it is trained on, and chosen by."""
    learning_rate: float
    """At its peak."""
    epochs: float
    """Passes over the demonstrations, over which the rate decays to zero."""
    rank: int = 0
    """Of a low-rank adapter of all projections; 0: all parameters are trained."""
    weight_decay: float = 0.01
    frozen_embeddings: bool = False
    """The embeddings, which are also the head, stay as they were."""
    statement_rows: int = 0
    """Rows of pre-training statements that are added to each batch."""
    fact_repeats: int = 1
    """How often each question on a fact is in the demonstrations."""
    batch_size: int = 4
    """Packed rows of demonstrations per step."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that no field is without effect."""
        if self.rank and self.frozen_embeddings:
            raise ValueError("an adapter leaves the embeddings as they are: frozen_embeddings")

    @property
    def variant(self) -> "Setting":
        """The setting without its rate, length and seed: what a bracket is about."""
        return dataclasses.replace(self, learning_rate=0.0, epochs=0.0, seed=0)

    @property
    def label(self) -> str:
        """The variant in words, for tables."""
        parts = [f"LoRA, rank {self.rank}" if self.rank else "full"]
        if self.weight_decay != Setting.weight_decay:
            parts.append(f"weight decay {self.weight_decay:g}")
        if self.frozen_embeddings:
            parts.append("embeddings frozen")
        if self.statement_rows:
            parts.append(f"{self.statement_rows} rows of statements per step")
        if self.fact_repeats > 1:
            parts.append(f"facts × {self.fact_repeats}")
        return ", ".join(parts)


class Point(NamedTuple):
    """Figures of a run on the validation split at one step."""

    step: int
    nll: float
    """Of the answers of the kinds that it is trained on, nats per token."""
    exact_match: float | None
    """Share of questions on facts answered word for word; None if it is not trained on them."""
    fact_nll: float | None
    docstring_nll: float | None
    keeps_docstrings: bool = True
    """On both kinds: whether the NLL of docstrings is no higher than before fine-tuning."""


Curve = Sequence[Point]


def best_point(curve: Curve, criterion: Criterion) -> Point:
    """The point that early stopping chooses; of equally good ones, that with the lowest NLL.

    By `exact_match` it is one that keeps docstrings, if there is any: a model that answers facts
    because it has forgotten the other task is no reference for both.

    >>> curve = [Point(1, 2.0, 0.5, None, None), Point(2, 3.0, 0.5, None, None)]
    >>> best_point(curve, "exact_match").step
    1
    >>> best_point([*curve, Point(3, 4.0, 0.9, None, 5.0, False)], "exact_match").step
    1
    """
    return min(curve, key=lambda point: _cost(point, criterion))


def best_setting(tried: Mapping[Setting, Curve], criterion: Criterion) -> Setting:
    """The setting whose early-stopped run is the best one.

    Args:
        tried: At least one setting, with its validation curve.
        criterion: What is compared.

    Returns:
        One of them.
    """
    return min(tried, key=lambda one: _cost(best_point(tried[one], criterion), criterion))


def criteria(kinds: Kinds) -> tuple[Criterion, ...]:
    """What runs on these demonstrations can be chosen by."""
    return ("nll",) if kinds in ("docstrings", "all") else ("nll", "exact_match")


def missing(starts: Sequence[Setting], tried: Mapping[Setting, Curve]) -> list[Setting]:
    """Settings to try before the best of a variant is enclosed, by either criterion.

    The rate next to the best one must have been tried on both sides. So must a longer run if the
    best step was among the last ones, unless the last lengthening gained little, and a shorter one
    if it was among the first.

    Args:
        starts: Settings of one variant that are tried in any case.
        tried: Finished settings of the same variant, with their curves.

    Returns:
        The starts that are missing; if there are none, the missing neighbours; empty when done.
    """
    left = [start for start in starts if start not in tried]
    if left or not tried:
        return left
    found: dict[Setting, None] = {}
    for criterion in criteria(starts[0].kinds):
        best = best_setting(tried, criterion)
        last, at = tried[best][-1].step, best_point(tried[best], criterion).step
        wanted = [*_next(RATES, best.learning_rate, -1), *_next(RATES, best.learning_rate, 1)]
        found |= {dataclasses.replace(best, learning_rate=rate): None for rate in wanted}
        longer = at >= _TOO_SHORT * last and _lengthening_pays(best, tried, criterion)
        lengths = _next(LENGTHS, best.epochs, 1) if longer else []
        lengths += _next(LENGTHS, best.epochs, -1) if at <= _TOO_LONG * last else []
        found |= {dataclasses.replace(best, epochs=epochs): None for epochs in lengths}
    return [setting for setting in found if setting not in tried]


def _lengthening_pays(best: Setting, tried: Mapping[Setting, Curve], by: Criterion) -> bool:
    """Whether the best setting is clearly better than all shorter ones; true if there are none."""
    shorter = {one: curve for one, curve in tried.items() if one.epochs < best.epochs}
    if not shorter:
        return True
    before, now = (
        _cost(best_point(tried[one], by), by)[0] for one in (best_setting(shorter, by), best)
    )
    return before - now >= _WORTH_IT[by]


def _next(ladder: Sequence[float], value: float, by: int) -> list[float]:
    at = ladder.index(value) + by
    return [ladder[at]] if 0 <= at < len(ladder) else []


def _cost(point: Point, criterion: Criterion) -> tuple[float, float]:
    if criterion == "nll":
        return point.nll, point.nll
    assert point.exact_match is not None, "a run on facts has it"
    return (-point.exact_match if point.keeps_docstrings else 1.0), point.nll
