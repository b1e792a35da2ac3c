"""What the post-training study compares: which networks are trained, and which models are measured.

Out: `Run`s and `Measurement`s, plain records whose names are their keys, in the order in which they
are made. A run trains a value network beside a frozen base, or a whole model alone for comparison.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

SEEDS = (0, 1, 2)

Model = Literal["S", "L", "X"]
Kind = Literal["sft", "dpo", "grpo", "distil", "fold"]
Split = Literal["validation", "test"]
MODELS: tuple[Model, ...] = ("S", "L", "X")
KINDS: tuple[Kind, ...] = ("sft", "grpo", "dpo")

# Learning rates of a model trained alone, chosen by kind on L's validation questions. At 1e-4, L
# fully fine-tuned on all demonstrations answers hardly any question word for word.
ALONE_RATES: dict[Kind, tuple[float, ...]] = {
    "sft": (1e-4, 3e-4, 6e-4),
    "grpo": (1e-4, 3e-4, 1e-3),
    "dpo": (1e-4, 3e-4, 1e-3),
}


class Run(NamedTuple):
    """One training; its settings are those of the demo config of its kind, changed by the study."""

    kind: Kind
    """`dpo` and `grpo` start from an `sft` run; `distil` learns a value network from a tuned model
    and its base, `fold` a whole model from a base and a value network."""
    model: Model
    """The frozen base, or the model that is trained alone."""
    alone: bool = False
    """Train the model itself, not a value network beside it."""
    seed: int = 0
    rate: float | None = None
    """Learning rate; None: that of the kind or, for a model trained alone, the best of its
    sweep."""

    @property
    def name(self) -> str:
        """What the run is called; no two runs share a name."""
        rate = "" if self.rate is None else f"_rate{self.rate:g}"
        return f"{self.kind}_{self.model}{'_alone' if self.alone else ''}_seed{self.seed}{rate}"

    @property
    def start(self) -> "Run | None":
        """The run whose network this one starts from: a value network's is always beside S."""
        if self.kind not in ("dpo", "grpo"):
            return None
        return Run("sft", self.model if self.alone else "S", self.alone, self.seed)

    @property
    def teacher(self) -> "Run | None":
        """The run that made the teacher, or the value network that is added to the teacher."""
        if self.kind == "distil":
            return Run("grpo", self.model, alone=True, seed=self.seed)
        return Run("grpo", "S", seed=self.seed) if self.kind == "fold" else None

    @property
    def sweep(self) -> "tuple[Run, ...]":
        """The runs of which the best one has the learning rate of this one; empty: no choice."""
        rates = ALONE_RATES.get(self.kind, ()) if self.alone and self.rate is None else ()
        return tuple(Run(self.kind, "L", alone=True, rate=rate) for rate in rates)

    @property
    def choices(self) -> "tuple[Run, ...]":
        """All runs of all sweeps that this run depends on."""
        needed = [one for one in (self.start, self.teacher, *self.sweep) if one is not None]
        return self.sweep + tuple(one for run in needed for one in run.choices)


class Measurement(NamedTuple):
    """One model on held-out questions and pairs."""

    base: Model
    run: Run | None = None
    """The run whose value network is added to the base, or that trained the base; None: the base
    as it is."""
    split: Split = "test"
    """`validation`: to choose a learning rate."""

    @property
    def name(self) -> str:
        """File name; no two measurements share one."""
        parts = [self.base, *([] if self.run is None else [self.run.name])]
        return "__".join(parts if self.split == "test" else [*parts, self.split])


def value_on(base: Model, kind: Kind, seed: int) -> Measurement:
    """A base with the value network that a run beside S trained."""
    return Measurement(base, Run(kind, "S", seed=seed))


def beside(kind: Kind, seed: int) -> Measurement:
    """L with S's value network after the same objective was trained on beside L itself."""
    return Measurement("L", Run(kind, "L", seed=seed))


def alone(base: Model, kind: Kind, seed: int) -> Measurement:
    """The same objective on the base itself."""
    return Measurement(base, Run(kind, base, alone=True, seed=seed))


def swept(kind: Kind) -> list[Measurement]:
    """The sweep of a kind's learning rate for models trained alone."""
    runs = Run(kind, "L", alone=True).sweep
    return [Measurement("L", run, split="validation") for run in runs]


def best_rate(kind: Kind, tried: Mapping[float, Mapping[str, float]]) -> float:
    """Choose a learning rate: the most pairs (DPO) or facts, then the lowest NLL.

    Args:
        kind: Of the swept runs.
        tried: Learning rate → figures on validation questions.

    Returns:
        The best learning rate.
    """
    key = "pair_accuracy" if kind == "dpo" else "exact_match"
    return max(tried, key=lambda rate: (tried[rate][key], -tried[rate]["nll"]))


def sweeps(run: Run) -> list[Measurement]:
    """What has to be measured before every learning rate that a run depends on is chosen."""
    return [Measurement("L", one, split="validation") for one in run.choices]


def distilled(base: Model, seed: int) -> Measurement:
    """A base with the value network learned from the tuned L and L."""
    return Measurement(base, Run("distil", "L", seed=seed))


def folded(seed: int) -> Measurement:
    """L with S's value network, as one model."""
    return alone("L", "fold", seed)


def measurements(seeds: Sequence[int] = SEEDS) -> Iterator[Measurement]:
    """Everything in the report, most important first.

    Args:
        seeds: Of the trainings.

    Yields:
        Measurements, none twice.
    """
    first, others = seeds[:1], seeds[1:]
    yield Measurement("S")
    yield Measurement("L")
    for seed in first:
        yield from _values(seed, KINDS)
    for seed in others:
        yield from _values(seed, ("sft", "dpo"))
    for seed in others:
        yield from _values(seed, ("grpo",))
    for kind in KINDS:
        yield from swept(kind)
        for seed in first:
            yield alone("L", kind, seed)
    for seed in others:
        for kind in KINDS:
            yield alone("L", kind, seed)
    for kind in ("grpo", "dpo"):
        for seed in first:
            yield beside(kind, seed)
    for seed in seeds:
        yield folded(seed)
    for seed in first:
        for base in ("L", "S"):
            yield distilled(base, seed)
    yield Measurement("X")
    for seed in seeds:
        for kind in KINDS:
            yield value_on("X", kind, seed)
    for seed in first:
        yield distilled("X", seed)
        for kind in KINDS:
            yield alone("X", kind, seed)


def _values(seed: int, kinds: Sequence[Kind]) -> Iterator[Measurement]:
    for kind in kinds:
        for base in ("S", "L"):
            yield value_on(base, kind, seed)
