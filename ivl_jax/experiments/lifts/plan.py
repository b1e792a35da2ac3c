"""What the study of lifts compares: ways to train S's value network that may help other bases.

Out: `Row`s, plain records whose names are their keys, and the lift that is best on validation rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

SEEDS = (0, 1, 2)
Target = Literal["L", "X"]
Lift = Literal[
    "plain", "calibrated", "temperature", "dropout", "bases", "adapted", "decay", "warmup"
]
Split = Literal["validation", "test"]
LIFTS: tuple[Lift, ...] = get_args(Lift)
"""Most important first."""
TARGETS: tuple[Target, ...] = get_args(Target)

BASE_TEMPERATURE = 2.0
BASE_DROPOUT = 0.1
ADAPTED_RATE = 5e-4
"""Peak learning rate beside L, a quarter of the demo's."""
CHANGES: Mapping[Lift, Mapping[str, Mapping[str, Any]]] = {
    "temperature": {"augmentation": {"base_temperature": BASE_TEMPERATURE}},
    "dropout": {"augmentation": {"base_dropout": BASE_DROPOUT}},
    "decay": {"penalty": {"schedule": "linear_decay"}},
    "warmup": {"penalty": {"schedule": "linear_warmup"}},
    "adapted": {"optimizer": {"learning_rate": ADAPTED_RATE}},
}
"""Table → options that differ from the demo's; none was swept."""

LABELS: dict[Lift, str] = {
    "plain": "the demo's recipe",
    "calibrated": "α and T calibrated",
    "temperature": f"base temperature, τ = {BASE_TEMPERATURE:g}",
    "dropout": f"base dropout, {BASE_DROPOUT:g}",
    "bases": "S and an early S, in turns",
    "adapted": "continued beside L",
    "decay": "λ falling to 0",
    "warmup": "λ rising from 0",
}


class Budget(NamedTuple):
    """How much is trained and calibrated on."""

    adapted_steps: int = 300
    """Steps beside L."""
    early_epochs: float = 0.5
    """Passes over the text of the early S; S has seen 1.5."""
    target_rows: int = 50
    """Validation rows of the target to calibrate on; no lift is judged by them."""


QUICK = Budget(adapted_steps=2, early_epochs=0.02, target_rows=2)


class Row(NamedTuple):
    """A target with a value network, on one split."""

    lift: Lift
    target: Target
    seed: int = 0
    split: Split = "validation"

    @property
    def name(self) -> str:
        """File name; no two rows share one."""
        return f"{self.target}__{self.lift}_seed{self.seed}__{self.split}"


def validation_rows(seed: int) -> Iterator[Row]:
    """Every lift with one seed, on both targets."""
    for lift in LIFTS:
        for target in TARGETS:
            yield Row(lift, target, seed)


def final_rows(best: Lift | None, seeds: Sequence[int]) -> Iterator[Row]:
    """The demo's recipe and the best lift, seed by seed."""
    for seed in seeds:
        for lift in dict.fromkeys(("plain", best or "plain")):
            for target in TARGETS:
                yield Row(lift, target, seed, "test")


def mean_nll(measured: Mapping[str, Mapping[str, Any]], lift: Lift, seed: int) -> float | None:
    """Validation NLL, the mean over the targets; None: not measured."""
    names = [Row(lift, target, seed).name for target in TARGETS]
    found = [measured[name]["nll"] for name in names if name in measured]
    return fmean(found) if len(found) == len(TARGETS) else None


def best_lift(measured: Mapping[str, Mapping[str, Any]], seed: int) -> Lift | None:
    """The lift with the lowest mean validation NLL.

    Args:
        measured: Figures by the name of their row.
        seed: Of the validation rows.

    Returns:
        The lift; None while one is not measured.
    """
    known: dict[Lift, float] = {}
    for lift in LIFTS:
        if (nll := mean_nll(measured, lift, seed)) is not None:
            known[lift] = nll
    return min(known, key=known.__getitem__) if len(known) == len(LIFTS) else None
