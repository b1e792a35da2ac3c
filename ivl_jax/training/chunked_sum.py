"""A sum over chunks of positions whose gradient is taken while a chunk's logits exist.

In: the head and the final hidden states of the trained network, everything else that a chunk reads,
and the loss of one chunk. Out: the sum and all scores. Nothing of the vocabulary's size is stored
for the backward pass or computed twice.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ivl_jax.composed.network import ComposedParams
from ivl_jax.model.decoder import Params

ChunkLoss = Callable[..., tuple[Array, dict[str, Array]]]
"""(head, trained [B t D], frozen) → (loss sum of a chunk, its scores)."""


class Frozen(NamedTuple):
    """What a chunk reads but does not differentiate."""

    params: ComposedParams
    teacher: ComposedParams | None
    positions: Any
    """Per position, [B T …]: hidden states of the networks that are not trained and of the teacher,
    targets and weights."""


def head_of(params: Params) -> Params:
    """What `logits_from_hidden` reads: the only parameters in a chunk's gradient.

    A tied head is transposed once per step: the gradient of `h · Eᵀ` with respect to E would
    transpose the logits' gradient [B T V] instead, at half the speed (2,048 × 128, CPU). An adapter
    has no head.
    """
    if "lm_head" in params:
        return {"lm_head": params["lm_head"]}
    if "embed_tokens" not in params:
        return {}
    return {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_sum(
    chunk_loss: ChunkLoss, head: Params, trained: Array, frozen: Frozen
) -> tuple[Array, dict[str, Array]]:
    """Σ over chunks of the loss, and all scores [C B t]; differentiable through the loss only.

    The gradient is with respect to `head` and `trained`.
    """

    def one(trained: Array, positions: Any) -> tuple[Array, dict[str, Array]]:
        return chunk_loss(head, trained, frozen._replace(positions=positions))

    return _scan_sum(one, (trained, frozen.positions))


def _sum_forward(
    chunk_loss: ChunkLoss, head: Params, trained: Array, frozen: Frozen
) -> tuple[tuple[Array, dict[str, Array]], Any]:
    with_gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

    def one(trained: Array, positions: Any) -> tuple[Any, Any]:
        (total, scores), (head_gradient, trained_gradient) = with_gradient(
            head, trained, frozen._replace(positions=positions)
        )
        return (total, head_gradient), (scores, trained_gradient)

    (total, head_gradient), (scores, trained_gradient) = _scan_sum(one, (trained, frozen.positions))
    return (total, scores), (head_gradient, trained_gradient)


def _sum_backward(chunk_loss: ChunkLoss, gradients: Any, cotangents: Any) -> Any:
    del chunk_loss
    scaled = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return (*scaled, None)


chunked_sum.defvjp(_sum_forward, _sum_backward)


def _scan_sum(one: Callable[..., tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """Sum the first result over chunks and stack the second; a single chunk needs no loop."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    first = jax.tree.map(lambda array: array[0], chunks)
    if count == 1:
        total, stacked = one(*first)
        return total, jax.tree.map(lambda array: array[None], stacked)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *first)[0])

    def body(total: Any, chunk: Any) -> tuple[Any, Any]:
        added, stacked = one(*chunk)
        return jax.tree.map(jnp.add, total, added), stacked

    return jax.lax.scan(body, zeros, chunks)
