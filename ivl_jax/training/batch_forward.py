"""Running networks over a training batch: those of the student, and those of the teacher.

In: a composition, its parameters and a micro-batch. Out: final hidden states, and the teacher's
logits at some of the positions.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from ivl_jax.composed.forward import HiddenStates, compose, network_logits, run_networks
from ivl_jax.composed.network import ComposedParams, Composition


def run_student(composition: Composition, networks: ComposedParams, batch: Any) -> HiddenStates:
    """Run the networks of the composition that is trained over a micro-batch.

    Args:
        composition: the static half.
        networks: the arrays.
        batch: one micro-batch, arrays [B T]; its cached states are those of this base.

    Returns:
        Final hidden states of all networks.
    """
    hidden, _ = run_networks(
        composition,
        networks,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        base_hidden=batch.base_states,
        base_scale=batch.base_scale,
    )
    return hidden


def run_teacher(
    teacher: Composition | None, params: ComposedParams | None, batch: Any
) -> HiddenStates | None:
    """Run the teacher over a micro-batch.

    Args:
        teacher: the static half; None: there is no teacher.
        params: its arrays, or None.
        batch: one micro-batch, arrays [B T].

    Returns:
        Its final hidden states, or None.
    """
    if teacher is None or params is None:
        return None
    hidden, _ = run_networks(
        teacher,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
    return hidden


def teacher_logits(
    teacher: Composition | None,
    strengths: tuple[float, ...],
    params: ComposedParams | None,
    hidden: HiddenStates | None,
) -> Float32[Array, "B T V"] | None:
    """The teacher's logits at the positions of its hidden states.

    Args:
        teacher: the static half; None: there is no teacher.
        strengths: α of each of its value networks.
        params: its arrays, or None.
        hidden: of `run_teacher`, at some of the positions.

    Returns:
        Composed logits, or None.
    """
    if teacher is None or params is None or hidden is None:
        return None
    logits = network_logits(teacher, params, hidden)
    return compose(teacher, params.values, logits, strengths=jnp.asarray([strengths], jnp.float32))
