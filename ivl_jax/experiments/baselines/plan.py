"""What the study of baselines compares: ways to use what a small training has learned.

Out: `Row`s, plain records whose names are their keys, in the order in which they are measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ivl_jax.experiments.finetune.settings import Criterion

SEEDS = (0, 1, 2)
TARGET_ROWS = 50
"""Validation rows that settings are chosen on."""

Target = Literal["L", "L-continued", "X"]
Method = Literal[
    "value",
    "calibrated",
    "entropy",
    "kl",
    "soup",
    "ensemble",
    "edited",
    "proxy",
    "proxy_for_facts",
    "diff",
    "diff_for_facts",
    "lines",
    "unlearned",
]
PROXY: Mapping[Method, Criterion] = {"proxy": "nll", "proxy_for_facts": "exact_match"}
"""What the fine-tuning of S was chosen by."""
PER_SEED: tuple[Method, ...] = ("value", "calibrated", "entropy", "kl", *PROXY)
"""Methods that use one value network, or one fine-tuned S; the others use three, or none."""

LABELS: dict[Method, str] = {
    "value": "value, α = 1",
    "calibrated": "value, α and temperature calibrated",
    "entropy": "value, strength by the base's entropy",
    "kl": "value, strength by the divergence",
    "soup": "soup of 3 values (mean parameters)",
    "ensemble": "logit ensemble of 3 values (α = 1/3 each)",
    "edited": "ensemble with S edited on the target rows",
    "proxy": "proxy-tuning, α and temperature calibrated",
    "proxy_for_facts": "the same, S fine-tuned for facts",
    "diff": "diff vector of L fine-tuned",
    "diff_for_facts": "diff vector of L fine-tuned for facts",
    "lines": "diff vector of L fine-tuned, LiNeS",
    "unlearned": "value, some people unlearned",
}

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
TEMPERATURES = (0.8, 1.0, 1.25)
POLICY_STRENGTHS = (1.0, 1.25, 1.5)
POLICY_SCALES: dict[str, tuple[float, ...]] = {
    "entropy": (0.01, 0.1, 0.3, 1.0),
    "kl": (1.0, 3.0, 10.0, 100.0),
}
"""Nats; each sweep ends where the policy hardly differs from a constant strength."""
EDITED_STRENGTHS = (0.5, 1.0, 2.0)
"""Of S edited minus S."""
FIRST_LAYER = (0.25, 0.5, 0.75, 1.0)
"""LiNeS: factors of the first layer; that of the last one is 1."""
UNLEARNING = (0.25, 0.5, 1.0, 2.0)
"""Negative strengths of what a value network learned of the people to forget."""


class Row(NamedTuple):
    """One model on the test split."""

    target: Target
    method: Method
    seed: int = 0
    strength: float | None = None
    """The negative strength of `unlearned`."""

    @property
    def name(self) -> str:
        """File name; no two rows share one."""
        strength = "" if self.strength is None else f"_{self.strength:g}"
        return f"{self.target}__{self.method}{strength}_seed{self.seed}"


class Setting(NamedTuple):
    """What is chosen on the target rows."""

    strength: float
    temperature: float = 1.0
    policy: str = "constant"
    scale: float = 1.0

    @property
    def strengths(self) -> tuple[float, float]:
        """Strengths of a value network and of the base as a second summand.

        (z + α z_value) / T = z + (α / T) z_value + (1 / T − 1) z
        """
        cold = 1 / self.temperature
        return cold * self.strength, cold - 1

    @property
    def sentence(self) -> str:
        """The setting in words."""
        if self.policy != "constant":
            return f"α = {self.strength:g}, scale {self.scale:g}"
        return f"α = {self.strength:g}, T = {self.temperature:g}"


def settings_of(method: Method) -> list[Setting]:
    """The settings that a method chooses from; one that has no choice has one.

    Args:
        method: Any.

    Returns:
        The settings.
    """
    if method == "calibrated" or method in PROXY:
        return [Setting(alpha, t) for alpha in STRENGTHS for t in TEMPERATURES]
    if method in POLICY_SCALES:
        scales = POLICY_SCALES[method]
        return [Setting(alpha, 1.0, method, s) for alpha in POLICY_STRENGTHS for s in scales]
    return [Setting(1.0)]


def rows(seeds: Sequence[int] = SEEDS) -> Iterator[Row]:
    """Everything in the report, most important first.

    Args:
        seeds: Of the value networks; what uses three always uses those of `SEEDS`.

    Yields:
        Rows, none twice.
    """
    first, others = seeds[:1], seeds[1:]
    for seed in first:
        for method in PER_SEED:
            yield Row("L", method, seed)
    yield Row("L", "edited")
    for strength in UNLEARNING:
        yield Row("L", "unlearned", strength=strength)
    yield Row("L", "soup")
    yield Row("L", "ensemble")
    for seed in others:
        for method in PER_SEED:
            yield Row("L", method, seed)
    for seed in first:
        for method in PER_SEED:
            yield Row("X", method, seed)
    for seed in first:
        for method in PER_SEED:
            yield Row("L-continued", method, seed)
    yield Row("L-continued", "diff")
    yield Row("L-continued", "diff_for_facts")
    yield Row("L-continued", "lines")
