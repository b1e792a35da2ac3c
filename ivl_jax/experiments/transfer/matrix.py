"""What the report compares: which models are trained, and which compositions are measured.

Out: `Training`s and `Measurement`s, plain records whose names are their keys. Every training
differs from the demo's settings only in the fields it sets, so a row of a table is one change.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from ivl_jax.config import PenaltyKind
from ivl_jax.experiments.finetune.settings import Criterion

Base = Literal["S", "L", "L-continued", "X", "XL", "S-continued"]
MapMethod = Literal["dtw", "bytes"]

RECORD = "experiments.json"
"""File of what has been measured: `measured`, figures by the name of their measurement."""
SEEDS = (0, 1, 2)
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)
PENALTIES: tuple[tuple[PenaltyKind, float], ...] = (
    ("none", 0.0),
    ("l1", 0.1),
    ("l1", 0.3),
    ("l1", 3.0),
    ("l2", 0.03),
    ("l2", 0.3),
)


class Training(NamedTuple):
    """One training.

    What it does not say is as in configs/demo.toml; of a fine-tuned model, as in the recorded
    reference (`finetune.references`).
    """

    label: str
    """What is different, for tables."""
    bases: tuple[Base, ...] = ("S",)
    """The bases that the value network is trained with, or the model that is fine-tuned."""
    method: Literal["value", "sft"] = "value"
    connection: str = "residual"
    init: Literal["pretrained", "scratch", "base"] = "pretrained"
    init_model: Base = "S"
    """The model whose weights or architecture a value network starts with."""
    penalty: tuple[PenaltyKind, float] = ("l1", 1.0)
    learning_rate: float | None = None
    """Peak learning rate of a value network; None: the demo's."""
    depths: int = 1
    """Last layers that the head of a value network reads."""
    chosen_by: Criterion = "nll"
    """What the settings and the step of a fine-tuned model are chosen by."""
    seed: int = 0

    @property
    def name(self) -> str:
        """Folder name; no two trainings share one."""
        kind, weight = self.penalty
        parts = [
            self.method,
            self.connection if self.method == "value" else "",
            "+".join(self.bases),
            f"{self.init}-{self.init_model}" if self.method == "value" else "",
            f"{kind}{weight:g}" if self.method == "value" else "",
            "" if self.learning_rate is None else f"lr{self.learning_rate:g}",
            "" if self.depths == 1 else f"depths{self.depths}",
            "" if self.chosen_by == "nll" else self.chosen_by,
            f"seed{self.seed}",
        ]
        return "_".join(part for part in parts if part)


class Term(NamedTuple):
    """One summand added to a base: a trained value network, or a whole language model."""

    model: Training | Base
    strength: float = 1.0


class Measurement(NamedTuple):
    """One composition on the test split."""

    base: Base | Training
    terms: tuple[Term, ...] = ()
    map_method: MapMethod | None = None
    """How the value's vocabulary is mapped to the base's; None: they share one."""
    centred: bool = False

    @property
    def name(self) -> str:
        """File name; no two measurements share one."""
        parts = [_name(self.base)]
        parts += [f"{term.strength:+g}x{_name(term.model)}" for term in self.terms]
        if self.map_method:
            parts.append(self.map_method + ("-centred" if self.centred else ""))
        return "__".join(parts)


def _name(model: Training | str) -> str:
    return model if isinstance(model, str) else model.name


def on(base: Base, *terms: Term, centred: bool = False) -> Measurement:
    """A composition on a base; on X through the map built by byte offsets."""
    method = "bytes" if base == "X" and terms else None
    return Measurement(base, terms, method, centred)


def recipe(seed: int) -> Training:
    """The demo's training: residual, pretrained, L1 with λ = 1."""
    return Training("L1, λ = 1", seed=seed)


def schemes(seed: int) -> list[Training]:
    """Connection schemes, the linear map on base logits, and a head that reads two depths."""
    return [
        recipe(seed)._replace(label="residual"),
        Training("cascade", connection="cascade", seed=seed),
        Training("cascade without text", connection="cascade_no_text", seed=seed),
        Training(
            "linear map on base logits",
            connection="linear",
            init="scratch",
            penalty=("none", 0.0),
            learning_rate=LINEAR_RATE,
            seed=seed,
        ),
        Training("residual, head reads both layers", depths=2, seed=seed),
    ]


# Half of the value network's; not swept.
LINEAR_RATE = 1e-3


def penalties(seed: int) -> list[Training]:
    """Kinds and weights of the penalty, including L1 with λ = 1."""
    swept = [
        Training(f"{kind.upper()}, λ = {weight:g}" if weight else "none", penalty=(kind, weight))
        for kind, weight in PENALTIES
    ]
    return [training._replace(seed=seed) for training in [*swept, recipe(0)]]


def initialisations(seed: int) -> list[Training]:
    """Where a value network's weights come from."""
    return [
        recipe(seed)._replace(label="pretrained"),
        Training("the base with a zeroed head", init="base", seed=seed),
        Training("random", init="scratch", seed=seed),
    ]


def base_choices(seed: int) -> list[Training]:
    """The bases that a value network is trained with."""
    return [
        recipe(seed)._replace(label="S"),
        Training("S and S-continued, in turns", bases=("S", "S-continued"), seed=seed),
    ]


def fine_tuned(model: Base, seed: int = 0, *, chosen_by: Criterion = "nll") -> Training:
    """A model fine-tuned on the demonstrations, the best that the sweep has found."""
    label = f"{model} fine-tuned"
    return Training(label, bases=(model,), method="sft", seed=seed, chosen_by=chosen_by)


def large_value(seed: int) -> Training:
    """A value network as large as L, trained with L."""
    return Training("trained on L", bases=("L",), init_model="L", seed=seed)


def proxy(base: Base, seed: int, *, chosen_by: Criterion = "nll") -> Measurement:
    """Proxy-tuning: base + (S fine-tuned − S)."""
    return on(base, Term(fine_tuned("S", seed, chosen_by=chosen_by)), Term("S", -1.0))


def reference(base: Base, chosen_by: Criterion = "nll") -> Callable[[int], Measurement]:
    """The base fine-tuned, by seed."""
    return lambda seed: Measurement(fine_tuned(base, seed, chosen_by=chosen_by))


def value_on(base: Base) -> Callable[[int], Measurement]:
    """The documented recipe's value network with a base, by seed."""
    return lambda seed: on(base, Term(recipe(seed)))


def proxy_on(base: Base, chosen_by: Criterion = "nll") -> Callable[[int], Measurement]:
    """Proxy-tuning of a base, by seed."""
    return lambda seed: proxy(base, seed, chosen_by=chosen_by)


def measurements(seeds: tuple[int, ...] = SEEDS) -> Iterator[Measurement]:
    """Everything in the report, most important first, seed by seed.

    Args:
        seeds: Of the trainings; studies that only support a choice use just the first one.

    Yields:
        Measurements, none twice.
    """
    seen: set[str] = set()
    for measurement in _all(seeds):
        if measurement.name not in seen:
            seen.add(measurement.name)
            yield measurement


def _all(seeds: tuple[int, ...]) -> Iterator[Measurement]:
    targets: tuple[Base, ...] = ("S", "L", "L-continued", "X")
    for base in targets:
        yield Measurement(base)
    first = seeds[0]
    for seed in seeds:
        for base in targets:
            yield on(base, Term(recipe(seed)))
        for base in targets:
            yield Measurement(fine_tuned(base, seed))
            yield Measurement(fine_tuned(base, seed, chosen_by="exact_match"))
        for base in targets[1:]:
            yield proxy(base, seed)
            yield proxy(base, seed, chosen_by="exact_match")
        for training in schemes(seed):
            yield on("S", Term(training))
            yield on("L", Term(training))
        if seed == first:
            for training in (*penalties(seed), *initialisations(seed), *base_choices(seed)):
                yield on("S", Term(training))
                yield on("L", Term(training))
            for training in base_choices(seed):
                yield on("L-continued", Term(training))
            for strength in STRENGTHS:
                yield on("S", Term(recipe(seed), strength))
                yield on("L", Term(recipe(seed), strength))
            for method in ("bytes", "dtw"):
                for centred in (False, True):
                    yield Measurement("X", (Term(recipe(seed)),), method, centred)
            for base in ("S", "L"):
                yield on(base, Term(large_value(seed)))
    yield Measurement("XL")
    for seed in seeds:
        yield on("XL", Term(recipe(seed)))
        yield Measurement(fine_tuned("XL", seed))
        yield Measurement(fine_tuned("XL", seed, chosen_by="exact_match"))
        yield proxy("XL", seed)
        yield proxy("XL", seed, chosen_by="exact_match")
    for seed in seeds[1:]:
        for training in (*penalties(seed), *initialisations(seed), *base_choices(seed)):
            yield on("L", Term(training))
        for training in base_choices(seed):
            yield on("L-continued", Term(training))
