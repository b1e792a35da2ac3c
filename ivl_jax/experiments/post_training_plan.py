"""What the post-training study compares: which networks are trained, and which models are measured.

Out: `Run`s and `Measurement`s, plain records whose names are their keys, in the order in which they
are made. A run trains a value network beside a frozen base, or a whole model alone for comparison.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

SEEDS = (0, 1, 2)

Model = Literal["S", "L", "X"]
Kind = Literal["sft", "dpo", "grpo", "distil", "fold"]
MODELS: tuple[Model, ...] = ("S", "L", "X")


class Run(NamedTuple):
    """One training; its settings are those of the demo config of its kind."""

    kind: Kind
    """`dpo` and `grpo` start from the `sft` run of the same model; `distil` learns a value network
    from a tuned model and its base, `fold` a whole model from a base and a value network."""
    model: Model
    """The frozen base, or the model that is trained alone."""
    alone: bool = False
    """Train the model itself, not a value network beside it."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Folder name; no two runs share one."""
        return f"{self.kind}_{self.model}{'_alone' if self.alone else ''}_seed{self.seed}"

    @property
    def start(self) -> "Run | None":
        """The run whose network this one starts from."""
        return self._replace(kind="sft") if self.kind in ("dpo", "grpo") else None

    @property
    def teacher(self) -> "Run | None":
        """The run that made the teacher, or the value network that is added to the teacher."""
        if self.kind == "distil":
            return Run("grpo", self.model, alone=True, seed=self.seed)
        return Run("grpo", "S", seed=self.seed) if self.kind == "fold" else None


class Measurement(NamedTuple):
    """One model on held-out questions and pairs."""

    base: Model
    run: Run | None = None
    """The run whose value network is added to the base, or that trained the base; None: the base
    as it is."""

    @property
    def name(self) -> str:
        """File name; no two measurements share one."""
        return self.base if self.run is None else f"{self.base}__{self.run.name}"


def value_on(base: Model, kind: Kind, seed: int) -> Measurement:
    """A base with the value network that a run beside S trained."""
    return Measurement(base, Run(kind, "S", seed=seed))


def alone(base: Model, kind: Kind, seed: int) -> Measurement:
    """The same objective on the base itself."""
    return Measurement(base, Run(kind, base, alone=True, seed=seed))


def distilled(base: Model, seed: int) -> Measurement:
    """A base with the value network learned from the tuned L and L."""
    return Measurement(base, Run("distil", "L", seed=seed))


def folded(seed: int) -> Measurement:
    """L with S's value network, as one model."""
    return alone("L", "fold", seed)


def measurements(
    seeds: Sequence[int] = SEEDS, alone_seeds: Sequence[int] = (0,)
) -> Iterator[Measurement]:
    """Everything in the report, most important first.

    Args:
        seeds: Of the value networks trained beside S.
        alone_seeds: Of the targets trained themselves, and of distillation from and into them,
            which take several times as long.

    Yields:
        Measurements, none twice.
    """
    for base in MODELS:
        yield Measurement(base)
    for seed in seeds:
        for kind in ("sft", "grpo", "dpo"):
            for base in MODELS:
                yield value_on(base, kind, seed)
    for seed in alone_seeds:
        yield folded(seed)
        for kind in ("sft", "grpo", "dpo"):
            yield alone("L", kind, seed)
        for base in ("L", "S", "X"):
            yield distilled(base, seed)
        for kind in ("sft", "grpo", "dpo"):
            yield alone("X", kind, seed)
