"""What the activations of a step take, and which remat policy they leave room for.

In: architectures and sizes; nothing is allocated. Out: bytes, and a policy.
"""

import functools
import logging
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.attention.form import AttentionForm
from ivl_jax.model.decoder import abstract_params, build_decoder, hidden_states
from ivl_jax.model.remat import Remat

logger = logging.getLogger(__name__)

# Of a device's memory. The rest is for what is not counted: logits, one layer's recomputed
# activations, gathered parameters, and gaps between arrays.
_SHARE = 0.8


def choose_remat(
    arch: ArchConfig,
    *,
    rows: int,
    length: int,
    compute_dtype: DTypeLike,
    attention: AttentionForm,
    held: int,
    memory: int | None,
) -> Remat:
    """Choose the policy that computes least twice and fits, and log it.

    Args:
        arch: of the trained network.
        rows: of a micro-batch on one device.
        length: positions per row.
        compute_dtype: of activations.
        attention: how attention is computed.
        held: bytes per device of everything else: parameters, gradients, moments, the base.
        memory: bytes that a device has; None: unknown, which `full` is the safe answer to.

    Returns:
        The policy. Tensor parallelism is not counted: activations that it splits count as whole.
    """
    if memory is None:
        return "full"
    chosen: Remat = "full"
    free = _SHARE * memory - held
    policies: tuple[Remat, ...] = ("none", "dots")
    for remat in policies:
        kept = rows * kept_bytes(
            arch, remat, length=length, compute_dtype=compute_dtype, attention=attention
        )
        if kept <= free:
            chosen = remat
            break
    logger.info(
        'step.remat: "%s" for %d rows of %d tokens per device; %.1f GB of %.1f GB are left for '
        "activations",
        chosen,
        rows,
        length,
        max(free, 0) / 1e9,
        memory / 1e9,
    )
    return chosen


def kept_bytes(
    arch: ArchConfig,
    remat: Remat,
    *,
    length: int,
    compute_dtype: DTypeLike,
    attention: AttentionForm,
) -> int:
    """Count what the layers keep of one row for the backward pass.

    Args:
        arch: the architecture.
        remat: the policy.
        length: positions per row.
        compute_dtype: of activations.
        attention: how attention is computed.

    Returns:
        Bytes, as JAX's own differentiation of the scanned decoder keeps them.
    """
    one_device = replace(attention, mesh=None)
    count = functools.partial(_residual_bytes, arch, remat, length, compute_dtype, one_device)
    return count(2) - count(1)  # parameters, of which there is one copy, cancel


def _residual_bytes(
    arch: ArchConfig,
    remat: Remat,
    length: int,
    compute_dtype: DTypeLike,
    attention: AttentionForm,
    rows: int,
) -> int:
    graphdef = build_decoder(
        arch, compute_dtype=compute_dtype, remat=remat, scan_layers=True, attention=attention
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def backward(params: Any, ids: Any) -> Any:
        def states(params: Any) -> Any:
            return hidden_states(graphdef, params, ids, positions=ids, segment_ids=ids)[0]

        return jax.vjp(states, params)[1]

    kept = jax.eval_shape(backward, abstract_params(arch, scan_layers=True), ids)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def shard_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays on one device.

    Args:
        shapes: a tree of arrays, or of their shapes and dtypes.
        shardings: where each of them lives.

    Returns:
        The sum over the tree.
    """
    sizes = jax.tree.map(
        lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
