"""The order of the reference sweep, and which of its runs are still missing.

In: settings that have been tried, with their validation curves. Out: the next settings. Pure
functions; a choice is always made from finished runs, so the sweep adapts and can be interrupted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ivl_jax.experiments.finetune.settings import (
    Criterion,
    Curve,
    Kinds,
    Model,
    Setting,
    best_setting,
    criteria,
    missing,
)

Part = Literal["full", "lora", "levers", "as L", "seeds"]
"""`as L`: the variants that were best for L, whose rates are searched anew."""
MODELS: tuple[Model, ...] = ("S", "X", "L", "L-continued")
SEEDS = (0, 1, 2)
_RANK = 16
# Peak rates and lengths that are tried first; the search goes on from the best of them.
_RATES: dict[Model, tuple[float, ...]] = {
    "L": (1e-4, 3e-4, 1e-3),
    "L-continued": (1e-4, 3e-4, 1e-3),
    "X": (3e-4, 1e-3),
    "S": (3e-4, 1e-3, 3e-3),
}
_LORA_RATES = (1e-3, 3e-3)
# Facts alone are a third of the demonstrations; a length grows where a criterion asks for it.
_EPOCHS: dict[Kinds, float] = {"facts": 10.0, "both": 3.0, "docstrings": 3.0}


class Stage(NamedTuple):
    """One part of the sweep: models of one kind on one set of demonstrations."""

    model: Model
    kinds: Kinds
    part: Part


_PARTS: tuple[Part, ...] = ("full", "levers", "lora", "seeds")
STAGES: tuple[Stage, ...] = (
    *(Stage(model, "both", part) for model in MODELS for part in _PARTS),
    # What bounds the fine-tuning of L on both from above.
    *(Stage("L", "facts", part) for part in _PARTS),
    Stage("L", "docstrings", "full"),
    Stage("L", "docstrings", "seeds"),
    Stage("XL", "both", "as L"),
    Stage("XL", "both", "seeds"),
)


def missing_runs(stage: Stage, tried: Mapping[Setting, Curve]) -> list[Setting]:
    """The runs of a stage that can be named by now and are missing.

    Args:
        stage: Which one; its predecessors in `STAGES` are finished.
        tried: Every finished run of any stage.

    Returns:
        Settings in the order in which to run them; after these, ask again. Empty: it is finished.
    """
    own = {
        one: curve
        for one, curve in tried.items()
        if (one.model, one.kinds) == (stage.model, stage.kinds)
    }
    first = {one: curve for one, curve in own.items() if one.seed == SEEDS[0]}
    if stage.part == "seeds":
        return [setting for setting in _seeds(first) if setting not in own]
    if stage.part == "levers":
        return _levers(stage, first)
    if stage.part == "as L":
        return _as_l(stage, first, chosen(tried, "L", stage.kinds))
    return _enclosed(_starts(stage), first)


def finished(tried: Mapping[Setting, Curve], model: Model, kinds: Kinds) -> bool:
    """Whether the search for a model's best setting on some demonstrations has ended.

    Args:
        tried: Finished runs.
        model: The model.
        kinds: The demonstrations.

    Returns:
        Whether no stage misses a run.
    """
    stages = [stage for stage in STAGES if (stage.model, stage.kinds) == (model, kinds)]
    return not any(missing_runs(stage, tried) for stage in stages)


def chosen(tried: Mapping[Setting, Curve], model: Model, kinds: Kinds) -> dict[Criterion, Setting]:
    """The best setting of a model by each criterion, over all that was varied.

    Args:
        tried: Finished runs.
        model: The model.
        kinds: The demonstrations.

    Returns:
        Criterion → setting, with the first seed; empty if no run has finished.
    """
    own = {
        one: curve
        for one, curve in tried.items()
        if (one.model, one.kinds, one.seed) == (model, kinds, SEEDS[0])
    }
    return {criterion: best_setting(own, criterion) for criterion in criteria(kinds) if own}


def _starts(stage: Stage) -> list[Setting]:
    rank = _RANK if stage.part == "lora" else 0
    rates = _LORA_RATES if rank else _RATES[stage.model]
    return [
        Setting(
            stage.model, stage.kinds, learning_rate=rate, epochs=_EPOCHS[stage.kinds], rank=rank
        )
        for rate in rates
    ]


def levers(setting: Setting) -> list[Setting]:
    """A setting with each of the further levers pulled, one at a time."""
    pulled = [
        dataclasses.replace(setting, statement_rows=4),
        dataclasses.replace(setting, weight_decay=0.1),
    ]
    if setting.kinds == "both":
        return [*pulled, dataclasses.replace(setting, fact_repeats=4)]
    return [
        *pulled,
        dataclasses.replace(setting, weight_decay=1.0),
        dataclasses.replace(setting, frozen_embeddings=True),
    ]


def _levers(stage: Stage, own: Mapping[Setting, Curve]) -> list[Setting]:
    """The levers at the best full fine-tuning; a lever that is the best of all is enclosed too."""
    plain = _starts(stage._replace(part="full"))[0].variant
    full = {one: curve for one, curve in own.items() if one.variant == plain}
    if not full:
        return []
    starts = levers(best_setting(full, criteria(stage.kinds)[-1]))
    left = [setting for setting in starts if setting not in own]
    if left:
        return left
    found: dict[Setting, None] = {}
    best = {best_setting(own, criterion).variant for criterion in criteria(stage.kinds)}
    for start in starts:
        if start.variant in best:
            found |= dict.fromkeys(_enclosed([start], own))
    return list(found)


def _as_l(
    stage: Stage, own: Mapping[Setting, Curve], best: Mapping[Criterion, Setting]
) -> list[Setting]:
    """The settings that were best for L by each criterion, enclosed for this model."""
    found: dict[Setting, None] = {}
    for setting in best.values():
        start = dataclasses.replace(setting, model=stage.model)
        found |= dict.fromkeys(_enclosed([start], own))
    return list(found)


def _enclosed(starts: Sequence[Setting], own: Mapping[Setting, Curve]) -> list[Setting]:
    """What is missing before the best setting of the variant of the starts is enclosed."""
    variant = starts[0].variant
    same = {one: curve for one, curve in own.items() if one.variant == variant}
    return missing(starts, same)


def _seeds(own: Mapping[Setting, Curve]) -> Iterator[Setting]:
    if own:
        kinds = next(iter(own)).kinds
        best = dict.fromkeys(best_setting(own, criterion) for criterion in criteria(kinds))
        for seed in SEEDS[1:]:
            yield from (dataclasses.replace(setting, seed=seed) for setting in best)
