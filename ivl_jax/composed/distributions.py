"""Entropy and divergences of next-token distributions, from their logits; pure.

In: logits [… V] in float32, −inf in padding columns. Out: nats per position.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


def entropy(logits: Float32[Array, "*B V"]) -> Float32[Array, "*B"]:
    """−Σ p log p in nats; columns of −inf count as 0."""
    log_p = jax.nn.log_softmax(logits)
    real = jnp.isfinite(log_p)
    return -jnp.sum(_masked_exp(log_p, real) * jnp.where(real, log_p, 0.0), axis=-1)


def kl_divergence(
    logits: Float32[Array, "*B V"], other: Float32[Array, "*B V"]
) -> Float32[Array, "*B"]:
    """KL(softmax(logits) ‖ softmax(other)) in nats; columns of −inf in both count as 0."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    real = jnp.isfinite(log_p)
    gap = jnp.where(real, log_p, 0.0) - jnp.where(real, log_q, 0.0)
    return jnp.sum(_masked_exp(log_p, real) * gap, axis=-1)


def js_divergence(
    logits: Float32[Array, "*B V"], other: Float32[Array, "*B V"]
) -> Float32[Array, "*B"]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) in nats, m the mean of both; at most log 2.

    Example:
        >>> far_apart = jnp.array([[0.0, 99.0]]), jnp.array([[99.0, 0.0]])
        >>> round(float(js_divergence(*far_apart)[0] / math.log(2)), 4)
        1.0
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    real = jnp.isfinite(log_p)
    log_p, log_q = jnp.where(real, log_p, 0.0), jnp.where(real, log_q, 0.0)
    log_mean = jnp.logaddexp(log_p, log_q) - math.log(2)
    terms = jnp.exp(log_p) * (log_p - log_mean) + jnp.exp(log_q) * (log_q - log_mean)
    return jnp.sum(jnp.where(real, terms, 0.0), axis=-1) / 2


def _masked_exp(log_p: Array, real: Array) -> Array:
    """Exp, 0 where not real; so is its gradient, which 0 · −inf would make NaN."""
    return jnp.where(real, jnp.exp(jnp.where(real, log_p, 0.0)), 0.0)
