"""Rotary position embeddings: parameters and positions in, angles and rotated heads out.

Everything is computed from the positions of the call; nothing is cached, so two models with
different bases of wavelengths live side by side.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ivl_jax.model.architecture import RopeParameters


def rope_frequencies(rope: RopeParameters, *, head_dim: int) -> Float[np.ndarray, " R"]:
    """Radians per position of each rotated pair.

    Args:
        rope: Rotary parameters.
        head_dim: H; pairs are (i, i + H/2).

    Returns:
        fp32, R = H/2.

    Source: transformers `modeling_rope_utils.py`, in the same fp32 arithmetic.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.rope_theta) ** exponents
    if rope.rope_type == "linear":
        return (frequencies / rope.factor).astype(np.float32)
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        context = rope.original_max_position_embeddings
        assert low is not None
        assert high is not None
        assert context is not None
        turns = context * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (frequencies * (kept + (1.0 - kept) / rope.factor)).astype(np.float32)
    return frequencies


def rope_angles(
    positions: Int[Array, "B T"], rope: RopeParameters, *, head_dim: int
) -> Float[Array, "B T R"]:
    """Rotation of every pair at every position, radians, fp32; R = H/2."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim=head_dim))
    return positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T R"]) -> Float[Array, "B T N H"]:
    """Rotates pair (i, i + H/2) of every head by its angle: in fp32, returned in x's dtype."""
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
