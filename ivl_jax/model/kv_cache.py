"""Key-value caches: what a decoder remembers of the tokens it has read.

In: an architecture, batch size and capacity. Out: a pytree the decoder reads and writes. Slot p of
a row holds position p; the caller keeps each row's length, and rolls back by using a smaller one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.model.architecture import ArchConfig


class KVCache(NamedTuple):
    """Keys (rotated) and values of every layer.

    With `scan_layers` each field is one array `[L B S K H]`.
    """

    keys: tuple[Array, ...] | Array  # one [B S K H] per layer
    values: tuple[Array, ...] | Array  # one [B S K H] per layer


def init_cache(
    arch: ArchConfig,
    *,
    batch_size: int,
    capacity: int,
    dtype: DTypeLike,
    scan_layers: bool = False,
) -> KVCache:
    """An empty cache.

    Args:
        arch: The decoder's architecture.
        batch_size: Rows, B.
        capacity: Slots a row has, S, tokens: prompt plus everything generated.
        dtype: Of keys and values; the compute dtype as a rule.
        scan_layers: Stack the layers, for a decoder built with `scan_layers`.

    Returns:
        Zeros, one `[B S K H]` per layer, or `[L B S K H]` stacked.
    """
    shape = (batch_size, capacity, arch.num_key_value_heads, arch.head_dim)
    if scan_layers:
        stacked = (arch.num_hidden_layers, *shape)
        return KVCache(jnp.zeros(stacked, dtype), jnp.zeros(stacked, dtype))
    layers = range(arch.num_hidden_layers)
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in layers),
        tuple(jnp.zeros(shape, dtype) for _ in layers),
    )


def cache_capacity(cache: KVCache) -> int:
    """Slots a row of the cache has, tokens."""
    return cache.keys[0].shape[-3]


def write_slots(
    cached: Float[Array, "B S K H"], new: Float[Array, "B T K H"], slots: Int[Array, "B T"]
) -> Float[Array, "B S K H"]:
    """Writes row b's `new[b, t]` into slot `slots[b, t]`; slots beyond the capacity are dropped."""
    rows = jnp.arange(cached.shape[0], dtype=slots.dtype)[:, None]
    return cached.at[rows, slots].set(new.astype(cached.dtype), mode="drop")


def visible_slots(
    positions: Int[Array, "B T"], *, capacity: int, window: int | None
) -> Bool[Array, "B 1 T S"]:
    """The slots each query sees: s ≤ p, and p − s < window where the layer has one."""
    slots = jnp.arange(capacity, dtype=positions.dtype)
    distance = positions[:, None, :, None] - slots[None, None, None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
