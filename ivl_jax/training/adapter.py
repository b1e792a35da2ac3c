"""Training of an adapter alone: the network's own parameters are frozen, like the base's.

In: a config and its models. Out: where the adapter and the frozen parameters live, and their
arrays. The train state, its checkpoints and the value folder hold the adapter only.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key

from ivl_jax.checkpoint.value_arrays import load_adapter
from ivl_jax.config import TrainConfig
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, stack_layers
from ivl_jax.model.lora import frozen_arch, init_adapter, without
from ivl_jax.model.projection import AS_TRAINED, KernelForm, Lora
from ivl_jax.training.models import Models, Placement, load_model_params, place_model

logger = logging.getLogger(__name__)


def trained_form(config: TrainConfig, models: Models) -> KernelForm:
    """How the kernels of the trained network are stored: as trained, or frozen with an adapter."""
    if models.lora is None:
        return AS_TRAINED
    return KernelForm(int8=config.value.lora.param_dtype == "int8", lora=models.lora)


def place_adapter(config: TrainConfig, models: Models, lora: Lora, mesh: Mesh) -> Placement:
    """Decide where an adapter's parameters live: split like the kernels that they change.

    Args:
        config: of the run.
        models: from `choose_models`.
        lora: the adapter.
        mesh: the device mesh.

    Returns:
        Shapes and shardings of the trained parameters.
    """
    # All that is trained is in float32, whatever the frozen parameters are.
    float32 = jnp.dtype("float32")
    whole = _place(config, models.arch, KernelForm(lora=lora), mesh, float32)
    others = _place(config, frozen_arch(_decoder(models)), AS_TRAINED, mesh, float32)
    trees = zip(
        (whole.shapes, whole.shardings, whole.unstacked_shardings),
        (others.shapes, others.shardings, others.unstacked_shardings),
        strict=True,
    )
    shapes, shardings, unstacked = (without(one, other) for one, other in trees)
    return Placement(shapes, shardings, unstacked, whole.vocab_rows, whole.scan_layers)


def place_frozen(config: TrainConfig, models: Models, mesh: Mesh) -> Placement | None:
    """Decide where the frozen parameters of the trained network live.

    Args:
        config: of the run.
        models: from `choose_models`.
        mesh: the device mesh.

    Returns:
        Shapes and shardings; None unless an adapter is trained.
    """
    if models.lora is None:
        return None
    int8 = config.value.lora.param_dtype == "int8"
    form, dtype = KernelForm(int8=int8), _float_dtype(config)
    return _place(config, frozen_arch(_decoder(models)), form, mesh, dtype)


def load_frozen(config: TrainConfig, models: Models, mesh: Mesh) -> Params | None:
    """Read the frozen parameters of the trained network onto the mesh.

    Args:
        config: of the run.
        models: from `choose_models`.
        mesh: the device mesh.

    Returns:
        The parameters; None unless an adapter is trained.
    """
    place = place_frozen(config, models, mesh)
    if place is None:
        return None
    logger.info("loading %s, which stays frozen under an adapter", models.trained.path)
    stored = config.value.lora.param_dtype
    return load_model_params(
        models.trained, _float_dtype(config), place, form=KernelForm(int8=stored == "int8")
    )


def make_adapter(
    config: TrainConfig, models: Models, place: Placement, key: Key[Array, ""]
) -> Params:
    """Make the adapter of step 0: a new one, or that of a LoRA value folder.

    Args:
        config: of the run.
        models: from `choose_models`; an adapter is trained.
        place: of the adapter.
        key: the run's PRNG key; random weights fold 0 into it.

    Returns:
        Its parameters, created sharded.
    """
    del config
    assert models.lora is not None
    if models.adapter is not None:
        logger.info("loading the adapter in %s for training", models.adapter.path)
        metadata: Any = models.adapter.metadata
        params = load_adapter(models.adapter.folder, metadata, shardings=place.unstacked_shardings)
        if not place.scan_layers:
            return params
        return jax.jit(stack_layers, out_shardings=place.shardings)(params)
    logger.info("a new adapter of rank %d, zero at first", models.lora.rank)
    make = functools.partial(
        init_adapter, _decoder(models), models.lora, scan_layers=place.scan_layers
    )
    return jax.jit(make, out_shardings=place.shardings)(jax.random.fold_in(key, 0))


def _place(
    config: TrainConfig, arch: Any, form: KernelForm, mesh: Mesh, dtype: jnp.dtype
) -> Placement:
    return place_model(
        arch,
        layout=config.trained_layout,
        param_dtype=dtype,
        scan_layers=config.step.scan_layers,
        mesh=mesh,
        form=form,
    )


def _float_dtype(config: TrainConfig) -> jnp.dtype:
    """The dtype of the frozen parameters; with int8 kernels, of the other parameters."""
    stored = config.value.lora.param_dtype
    return jnp.dtype("float32" if stored == "int8" else stored)


def _decoder(models: Models) -> ArchConfig:
    assert isinstance(models.arch, ArchConfig)
    return models.arch
