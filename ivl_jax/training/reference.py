"""The frozen model that an objective compares with, beside the base: a teacher, or the original.

In: a config and its models. Out: a `Teacher`: networks and parameters on the mesh. A distillation
has a teacher; a model that is trained alone with an objective that needs a reference is compared
with itself as it was before the run.
"""

from jax.sharding import Mesh

from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.config import TrainConfig
from ivl_jax.training.models import Models, load_base, place_base
from ivl_jax.training.networks import frozen_network
from ivl_jax.training.teacher import Teacher, load_teacher


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
