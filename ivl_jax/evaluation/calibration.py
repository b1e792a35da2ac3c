"""The strengths and the temperature that fit a few dialogues best, by maximum likelihood.

    p = softmax((z_base + Σ α_i z_i) / T)

In: a composed model, rows to score and which of their tokens count. Out: α of each value network
and T. −log p is convex in α/T and 1/T, so there is one best fit, whatever the start.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import minimize

from ivl_jax.buckets import bucket
from ivl_jax.composed.network import Composition
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.scoring import Row, batch_arrays, padded_rows, score_rows, score_tokens

_LOGGER = logging.getLogger(__name__)

_TEMPERATURES = (0.1, 10.0)
# Nats per token and unit of α/T or 1/T. float32 leaves up to 2e-4, at which the line search fails
# and the fit is as good as it gets.
_FLAT = 1e-3

Masks = Sequence[Bool[np.ndarray, " _"]]
"""Which of each row's tokens after the first count, [n − 1]."""


class Calibration(NamedTuple):
    """What composed logits are made and sampled with."""

    strengths: tuple[float, ...]
    """α of each value network."""
    temperature: float
    """What composed logits are divided by; it changes no greedy answer."""


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """A fit to dialogues, and what such a fit does for dialogues that it has not seen."""

    strengths: tuple[float, ...]
    """α of each value network, fitted to all dialogues."""
    temperature: float
    given_nll: float
    """At the given strengths and T = 1, nats per token."""
    nll: float
    """Of each half of the dialogues as fitted to the other half, nats per token."""


def calibrate(
    model: ComposedModel, rows: Sequence[Row], masks: Masks, *, batch_size: int
) -> Calibration:
    """Fit strengths and temperature to rows, about 50.

    Args:
        model: the base with its value networks, at the strengths to start from.
        rows: as `score_rows` takes them.
        masks: which of their tokens count.
        batch_size: rows scored together.

    Returns:
        The fit, with T in [0.1, 10]; a warning tells of one at an end of it, or not the best.

    Raises:
        ValueError: no value network, no counted token, or a strength policy, which varies the
            strengths itself.
        ArithmeticError: the likelihood is not a finite number.
    """
    if not model.values:
        raise ValueError("a calibration fits the strengths of value networks: got none")
    if not any(mask.any() for mask in masks):
        raise ValueError(f"none of the {len(rows)} rows to calibrate on has a token that counts")
    if not model.policy.is_constant:
        raise ValueError(
            f'the strength policy "{model.policy.name}" varies strengths from token to token: '
            "calibrate with the constant one"
        )
    size = padded_rows(model, min(batch_size, bucket(len(rows), smallest=1)))
    batches = [
        _batch(model, rows[start : start + batch_size], masks[start : start + batch_size], size)
        for start in range(0, len(rows), batch_size)
    ]
    program, tokens = _program(model.composition), sum(int(mask.sum()) for mask in masks)

    def mean(point: Float64[np.ndarray, " M1"]) -> tuple[float, Float64[np.ndarray, " M1"]]:
        found = [program(model.params, np.float32(point), **batch) for batch in batches]
        nll, slope = (np.sum(jax.device_get(each), axis=0) for each in zip(*found, strict=True))
        if not np.isfinite(nll) or not np.isfinite(slope).all():
            raise ArithmeticError(f"NLL {nll} at (α/T, 1/T) = {point}: not a finite number")
        return float(nll) / tokens, np.asarray(slope, np.float64) / tokens

    bounds = [(None, None)] * len(model.values) + [(1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0])]
    start = np.array([*model.strengths, 1.0])
    found = minimize(mean, start, jac=True, method="L-BFGS-B", bounds=bounds)
    *scaled, inverse = found.x.tolist()
    fit = Calibration(tuple(each / inverse for each in scaled), 1 / inverse)
    at_bound = inverse in bounds[-1]
    slope = np.abs(found.jac[:-1] if at_bound else found.jac).max()
    if not found.success and slope > _FLAT:
        _LOGGER.warning(
            "the calibration did not converge (%s): after %d iterations its slope is still %.2g "
            "nats, so a better fit exists",
            found.message,
            found.nit,
            slope,
        )
    if at_bound:
        _LOGGER.warning(
            "the calibration ended at the bound T = %g: these %d rows do not determine a "
            "temperature; give more",
            fit.temperature,
            len(rows),
        )
    return fit


def calibration_report(
    model: ComposedModel, rows: Sequence[Row], masks: Masks, *, batch_size: int
) -> CalibrationReport:
    """Fit strengths and temperature, and say what the fit is worth on held-out rows.

    Args:
        model: as in `calibrate`.
        rows: as in `calibrate`.
        masks: as in `calibrate`; of every other row, and of the others, some tokens count. A row
            that repeats one of the other half is not held out: leave copies out.
        batch_size: rows scored together.

    Returns:
        The fit to all rows; the NLL before, and after by fits to the other half of the rows.

    Raises:
        ValueError: as `calibrate`.
        ArithmeticError: as `calibrate`.
    """
    given, total = Calibration(tuple(model.strengths), 1.0), 0.0
    for half, other in ((0, 1), (1, 0)):
        fit = calibrate(model, rows[half::2], masks[half::2], batch_size=batch_size)
        total += _total(model, rows[other::2], masks[other::2], fit, batch_size)
    best = calibrate(model, rows, masks, batch_size=batch_size)
    tokens = sum(int(mask.sum()) for mask in masks)
    return CalibrationReport(
        strengths=best.strengths,
        temperature=best.temperature,
        given_nll=_total(model, rows, masks, given, batch_size) / tokens,
        nll=total / tokens,
    )


def _total(
    model: ComposedModel, rows: Sequence[Row], masks: Masks, fit: Calibration, batch_size: int
) -> float:
    """−Σ log p of the counted tokens, nats."""
    fitted = dataclasses.replace(model, strengths=fit.strengths)
    scored = score_rows(fitted, rows, batch_size=batch_size, temperature=fit.temperature)
    return -sum(
        float(scores.tokens.log_prob[masks[index]].sum(dtype=np.float64))
        for index, scores in scored
    )


def _batch(model: ComposedModel, rows: Sequence[Row], masks: Masks, size: int) -> dict[str, Any]:
    arrays = batch_arrays(model, rows, size)
    counted = np.zeros(arrays["tokens"].shape, bool)
    for row, mask in zip(counted, masks, strict=False):
        row[: len(mask)] = mask
    return arrays | {"counted": counted}


@functools.cache
def _program(composition: Composition) -> Callable[..., Any]:
    """(arrays, (α_1/T, …, 1/T), batch) → −Σ log p of its counted tokens, and its derivative."""

    def program(
        params: Any, point: Any, *, counted: Any, strengths: Any, max_logits: int, **arrays: Any
    ) -> Any:
        def total(point: Any) -> tuple[Any, Any]:
            tokens, _, _ = score_tokens(
                composition,
                params,
                strengths=jnp.broadcast_to(point[:-1] / point[-1], strengths.shape),
                temperature=1 / point[-1],
                max_logits=max_logits,
                with_base=False,
                **arrays,
            )
            nll = -jnp.sum(jnp.where(counted, tokens.log_prob, 0.0))
            return nll, nll

        # Forward mode: the backward one would store all logits.
        slope, nll = jax.jacfwd(total, has_aux=True)(point)
        return nll, slope

    return jax.jit(program, static_argnames="max_logits")
