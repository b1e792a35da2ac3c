"""The static halves of a run's networks: the trained one, and each frozen base.

In: a config and models. Out: `Network`s on the run's mesh.
"""

import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.composed.network import Layout, Network
from ivl_jax.config import TrainConfig
from ivl_jax.model.network import build_network
from ivl_jax.model.remat import Remat
from ivl_jax.sharding import LAYOUTS
from ivl_jax.training.adapter import trained_form
from ivl_jax.training.models import FrozenBase, Models, attention_of, base_is_stacked, kernel_form


def trained_network(config: TrainConfig, models: Models, mesh: Mesh, *, remat: Remat) -> Network:
    """Make the static half of the network that is trained.

    Args:
        config: of the run.
        models: from `choose_models`.
        mesh: the device mesh.
        remat: what its layers compute again in the backward pass.

    Returns:
        The value network, or without a base the model that is trained alone.
    """
    layout = Layout(mesh, LAYOUTS[config.trained_layout])
    return Network(
        build_network(
            models.arch,
            compute_dtype=jnp.dtype(config.step.compute_dtype),
            scan_layers=config.step.scan_layers,
            remat=remat,
            form=trained_form(config, models),
            attention=attention_of(config, models.arch, layout),
            all_depths=distils_depths(config),
        ),
        models.arch,
        models.trained.info.vocab_size,
        scheme=models.scheme,
        replacement_id=models.trained.info.replacement_id,
        layout=layout,
    )


def distils_depths(config: TrainConfig) -> bool:
    """Whether the loss needs what the head of the trained network could read of each depth."""
    value = config.value
    return config.method == "value" and value.depths > 1 and value.depths_distillation > 0


def frozen_network(config: TrainConfig, base: FrozenBase, mesh: Mesh) -> Network:
    """Make the static half of a frozen base; it has no backward pass, so nothing is recomputed.

    Args:
        config: of the run.
        base: the base.
        mesh: the device mesh.

    Returns:
        The base.
    """
    layout = Layout(mesh, LAYOUTS[base.config.layout])
    return Network(
        build_network(
            base.model.arch,
            compute_dtype=jnp.dtype(config.step.compute_dtype),
            scan_layers=base_is_stacked(config),
            form=kernel_form(base.config),
            attention=attention_of(config, base.model.arch, layout),
        ),
        base.model.arch,
        base.model.info.vocab_size,
        replacement_id=base.model.info.replacement_id,
        layout=layout,
    )
