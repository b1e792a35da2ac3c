"""Variations of the base in training, so that the value network does not depend on this one base.

In: a batch and a key. Out: the batch with what the base's logits are multiplied by. The draws are
those of the key alone: the same on any mesh, in any number of micro-batches, and after a resume.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ivl_jax.config import AugmentationConfig
from ivl_jax.data.batching import Batch


def augment(options: AugmentationConfig, batch: Batch, key: Key[Array, ""]) -> Batch:
    """Draw a temperature of the base, or its absence, for each dialogue of a batch.

    Args:
        options: the largest temperature, and the share of dialogues without the base.
        batch: arrays [A B T].
        key: of this step.

    Returns:
        The batch with a `base_scale` [A B T] that is the same all along a dialogue: 1/temperature,
        log-uniform in [1/τ, τ], or 0.
    """
    segments = jnp.asarray(batch.segment_ids)
    micro_batches, rows, length = segments.shape
    of_temperature, of_dropout = jax.random.split(key)
    # Dialogues of a row are numbered from 1, and there are at most as many as positions.
    shape = (micro_batches * rows, length + 1)
    powers = jax.random.uniform(of_temperature, shape, minval=-1.0, maxval=1.0)
    scales = jnp.exp(math.log(options.base_temperature) * powers)
    dropped = jax.random.bernoulli(of_dropout, options.base_dropout, shape)
    scales = jnp.where(dropped, 0.0, scales).reshape(micro_batches, rows, -1)
    return batch._replace(base_scale=jnp.take_along_axis(scales, segments, axis=-1))
