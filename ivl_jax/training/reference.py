"""The frozen model that an objective compares with, beside the base: a teacher, or the original.

In: a config and its models. Out: a `Teacher`: networks and parameters on the mesh. A distillation
has a teacher; a model that is trained alone with an objective that needs a reference is compared
with itself as it was before the run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.composed.network import ComposedParams, Composition, ValueArrays
from ivl_jax.config import TrainConfig
from ivl_jax.training.models import Models, Placement, load_base, place_base, place_model
from ivl_jax.training.networks import frozen_network
from ivl_jax.training.teacher import (
    Teacher,
    load_teacher,
    teacher_composition,
    teacher_strengths,
)


def load_reference(config: TrainConfig, models: Models, mesh: Mesh) -> Teacher | None:
    """Read the weights of the frozen model that a run's objective compares with.

    Args:
        config: of the run.
        models: from `choose_models`.
        mesh: the device mesh.

    Returns:
        The teacher, or the original of the model that is trained; None: there is neither.
    """
    if models.teacher is not None:
        return load_teacher(
            config.distil, models.teacher, compute_dtype=config.step.compute_dtype, mesh=mesh
        )
    original = models.original
    if original is None:
        return None
    place = place_base(config, original, mesh)
    return Teacher(
        Composition(frozen_network(config, original, mesh)),
        (),
        ComposedParams(load_base(original.model, original.config, place)),
        ComposedParams(place.shardings),
    )


def describe_reference(config: TrainConfig, models: Models, mesh: Mesh) -> Teacher | None:
    """As `load_reference`, with shapes in place of the weights, which are not read.

    Args:
        config: of the run.
        models: from `choose_models`.
        mesh: the device mesh, whose devices need not be attached.

    Returns:
        The teacher, whose parameters are ShapeDtypeStructs with shardings.
    """
    if models.teacher is not None:
        sources = models.teacher
        composition = teacher_composition(
            sources, compute_dtype=config.step.compute_dtype, mesh=mesh
        )
        strengths = teacher_strengths(config.distil)
        base, *values = (
            place_model(
                source.arch,
                layout="full",
                param_dtype=jnp.dtype(config.distil.param_dtype),
                scan_layers=False,
                mesh=mesh,
            )
            for source in (sources.base, *sources.values)
        )
    elif models.original is not None:
        composition = Composition(frozen_network(config, models.original, mesh))
        strengths = ()
        base, values = place_base(config, models.original, mesh), []
    else:
        return None
    params = ComposedParams(_shapes(base), tuple(ValueArrays(_shapes(one)) for one in values))
    return Teacher(composition, strengths, params, jax.tree.map(lambda leaf: leaf.sharding, params))


def _shapes(place: Placement) -> Any:
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        place.shapes,
        place.shardings,
    )
