"""AdamW with clipping and a learning-rate schedule, as one optax chain; the schedule of λ.

In: plain numbers. Out: an `optax.GradientTransformation` and the schedules of a run.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import optax

from ivl_jax.config import PenaltySchedule
from ivl_jax.training.moments import bfloat16_moments

# Leaves that are matrices. Decided by name: the stacked norms of scanned layers are [L D] too.
_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


class Schedules(NamedTuple):
    """What changes from step to step."""

    learning_rate: optax.Schedule
    penalty: optax.Schedule | None = None
    """Step number (0-based) → share of λ; None: all of it at every step."""


def make_schedule(
    *,
    learning_rate: float,
    schedule: Literal["cosine", "linear", "constant"],
    warmup_fraction: float,
    final_fraction: float,
    total_steps: int,
) -> optax.Schedule:
    """Make the learning rate as a function of the step.

    Args:
        learning_rate: peak.
        schedule: shape after warm-up.
        warmup_fraction: share of all steps with a linear rise from 0; a share above 0 means at
            least one step.
        final_fraction: learning rate after the last step, as a share of the peak (`cosine` and
            `linear`).
        total_steps: optimizer steps of the whole run.

    Returns:
        Step number (0-based) → learning rate; float32.

    Raises:
        ValueError: no steps.

    Source:
        The paper's recipe is `cosine` with a warm-up of 1 % (section 4.1).
    """
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least one step, got total_steps = {total_steps}")
    warmup = min(math.ceil(warmup_fraction * total_steps), total_steps)
    rest = max(total_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(learning_rate, rest, alpha=final_fraction),
        "linear": optax.linear_schedule(learning_rate, final_fraction * learning_rate, rest),
        "constant": optax.constant_schedule(learning_rate),
    }[schedule]
    if not warmup:
        return decay
    # The first step's rate is not 0: a rise from exactly 0 would waste one batch.
    rise = optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_penalty_schedule(schedule: PenaltySchedule, *, total_steps: int) -> optax.Schedule | None:
    """Make the share of λ that applies at a step.

    Args:
        schedule: `constant`; `linear_warmup`, from λ/N at the first of N steps to λ at the last;
            `linear_decay`, the same backwards.
        total_steps: optimizer steps of the whole run, N.

    Returns:
        Step number (0-based) → share, in (0, 1]; None if it is constant.

    Example:
        >>> [float(make_penalty_schedule("linear_decay", total_steps=4)(t)) for t in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if schedule == "constant":
        return None
    first, last = 1 / total_steps, 1.0
    if schedule == "linear_decay":
        first, last = last, first
    return optax.linear_schedule(first, last, max(total_steps - 1, 1))


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    max_gradient_norm: float,
    moment_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Make AdamW with decoupled weight decay on matrices, after clipping by the global norm.

    Weight decay applies to kernels and embeddings but not to norm scales and biases, as in the
    Hugging Face trainer that the paper used.

    Args:
        schedule: step number → learning rate.
        weight_decay: share of a matrix removed per step, times the learning rate (paper: 0.01).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the square root of the second moment.
        max_gradient_norm: global norm above which gradients are scaled down; 0: never.
        moment_dtype: how the moments are stored (`bfloat16_moments`).

    Returns:
        The optax chain; the updates are computed in float32 like the master weights.
    """
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)
    if moment_dtype == "bfloat16":
        adam = bfloat16_moments(adam)
    # optax.adamw, with another way to store the moments.
    adamw = optax.chain(
        adam,
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    if not max_gradient_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(max_gradient_norm), adamw)


def decay_mask(params: Any) -> Any:
    """Mark the leaves that weight decay applies to: matrices, recognised by name.

    Args:
        params: nested dict of parameters (or any tree of the same structure).

    Returns:
        The same structure of booleans.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(path) and getattr(path[-1], "key", None) in _MATRICES, params
    )
