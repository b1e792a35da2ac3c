"""Rotary position embeddings: parameters and positions in, rotated heads out.

Everything is computed from the positions of the call; nothing is cached, so that models with
different `rope_theta` can coexist in a process.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ivl_jax.model.rope_parameters import RopeParameters


class Rotation(NamedTuple):
    """How queries and keys are rotated in one kind of layer."""

    angles: Array  # [B T R] radians of every rotated pair, fp32
    scale: Array  # [] factor of the rotated numbers, fp32


def rope_frequencies(rope: RopeParameters, *, head_dim: int) -> Float[np.ndarray, " R"]:
    """Radians per position of each rotated pair.

    Args:
        rope: Rotary parameters.
        head_dim: H; pairs are (i, i + R).

    Returns:
        fp32, R = H/2 if the whole head is rotated.

    Source: transformers `modeling_rope_utils.py`, in the same fp32 arithmetic.
    """
    width = rope.rotated_width(head_dim)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = np.float32(1.0) / np.float32(rope.rope_theta) ** exponents
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "linear":
        return (frequencies / rope.factor).astype(np.float32)
    kept = (
        _kept_by_llama3(rope, frequencies)
        if rope.rope_type == "llama3"
        else _kept_by_yarn(rope, width)
    )
    return (frequencies * (kept + (1.0 - kept) / rope.factor)).astype(np.float32)


def _kept_by_llama3(rope: RopeParameters, frequencies: np.ndarray) -> np.ndarray:
    """The share of each frequency that is kept, 0 to 1: a ramp over turns per original context."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    context = rope.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert context is not None
    turns = context * frequencies / (2 * np.pi)
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(rope: RopeParameters, width: int) -> np.ndarray:
    """The same for yarn: a ramp over the pair's index, whose ends may be rounded to integers."""
    context, fast, slow = rope.original_max_position_embeddings, rope.beta_fast, rope.beta_slow
    assert context is not None
    assert fast is not None
    assert slow is not None

    def pair_of(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = pair_of(fast), pair_of(slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first or 0.001
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(first)) / np.float32(span)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def rotation(positions: Int[Array, "B T"], rope: RopeParameters, *, head_dim: int) -> Rotation:
    """How heads are rotated at each position.

    Args:
        positions: Of each token in its own sequence.
        rope: Rotary parameters.
        head_dim: H.

    Returns:
        Angles and scale.
    """
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim=head_dim))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    scale = 1.0 if rope.attention_factor is None else rope.attention_factor
    return Rotation(angles, jnp.asarray(scale, jnp.float32))


def no_rotation(like: Rotation) -> Rotation:
    """An identity rotation of the same shapes, for layers without rotary embedding."""
    return Rotation(jnp.zeros_like(like.angles), jnp.ones_like(like.scale))


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotate pair (i, i + R) of every head by its angle, in fp32; returns x's dtype."""
    pairs = rotation.angles.shape[-1]
    cos = jnp.cos(rotation.angles)[:, :, None, :] * rotation.scale
    sin = jnp.sin(rotation.angles)[:, :, None, :] * rotation.scale
    wide = x.astype(jnp.float32)
    first, second, rest = jnp.split(wide, [pairs, 2 * pairs], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
