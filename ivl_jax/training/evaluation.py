"""Held-out evaluation: the base alone and the base with the value network on the same batches.

In: parameters. Out: NLL in nats per token, top-1 accuracy and mean |z_value|.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from ivl_jax.data.batching import Batch
from ivl_jax.model.decoder import Params
from ivl_jax.sharding import place_batch
from ivl_jax.training.loss import Sums
from ivl_jax.training.step import EvalStep


@dataclass(frozen=True)
class Evaluation:
    """The held-out figures at one step of a run."""

    mean: dict[str, float]
    """The figures of the only base; with several, their mean weighted by the bases' weights."""
    by_base: dict[str, dict[str, float]]
    """With several bases: each base's figures, by its name; else empty."""

    @classmethod
    def of(cls, figures: Mapping[str, dict[str, float]], weights: Sequence[float]) -> "Evaluation":
        """Combine the figures of all bases.

        Args:
            figures: of each base, by its name, as `HeldOut` returns them.
            weights: of each base.

        Returns:
            The evaluation.
        """
        if len(figures) == 1:
            return cls(next(iter(figures.values())), {})
        weighted = [
            (weight / sum(weights), one)
            for weight, one in zip(weights, figures.values(), strict=True)
        ]
        names = next(iter(figures.values()))
        mean = {name: sum(share * one[name] for share, one in weighted) for name in names}
        return cls(mean, dict(figures))

    def to_json(self) -> dict[str, Any]:
        """The record that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any] | None) -> "Evaluation | None":
        """Reads what `to_json` wrote; None stays None."""
        return None if record is None else cls(**record)


class HeldOut:
    """Evaluates parameters on a fixed set of batches."""

    def __init__(
        self,
        step: EvalStep,
        batches: Iterable[Batch],
        *,
        count: int,
        base_params: Params | None,
        figures: Mapping[str, tuple[str, str]],
        mesh: Mesh,
    ) -> None:
        """Store what an evaluation needs besides the parameters.

        Args:
            step: from `make_eval_step`.
            batches: this process's rows; each iteration is one pass.
            count: batches per pass.
            base_params: of the frozen base; None without one.
            figures: name of a figure → the sums whose quotient it is.
            mesh: where batches are placed.
        """
        self._step = step
        self._batches = batches
        self._base_params = base_params
        self._figures = figures
        self._mesh = mesh
        self.count = count

    def __call__(
        self, params: Params, *, advance: Callable[[], object] = lambda: None
    ) -> dict[str, float]:
        """Evaluate.

        Args:
            params: of the trained model.
            advance: called after each batch.

        Returns:
            The objective's figures, such as `nll` (nats per counted token) and `accuracy` (top-1),
            and `tokens` (counted); with a base also `base_nll`, `base_accuracy` and
            `mean_abs_value`. Sums are added in float64.

        Raises:
            ValueError: no batch has a counted token.
        """
        totals: dict[str, float] = {}
        waiting: Any = None
        for batch in self._batches:
            sums = self._step(params, self._base_params, place_batch(batch, self._mesh))
            self._add(totals, waiting)
            waiting = sums
            advance()
        self._add(totals, waiting)
        if not totals.get("loss_tokens"):
            raise ValueError("the held-out demonstrations have no token that counts in the loss")
        figures = {
            name: totals[total] / max(totals[count], 1.0)
            for name, (total, count) in self._figures.items()
            if total in totals and count in totals
        }
        if self._base_params is None:
            figures.pop("mean_abs_value")
        return figures | {"tokens": totals["loss_tokens"]}

    @staticmethod
    def _add(totals: dict[str, float], sums: Sums | None) -> None:
        if sums is not None:
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
