"""Key-value caches of the tokens that a decoder has read.

In: an architecture, batch size and capacity. Out: a pytree that the decoder reads and writes. Slot
p of a row is position p; the caller keeps each row's length, and rolls back by using a smaller one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.linear_map import LinearMapConfig


class KVCache(NamedTuple):
    """Rotated keys, and values, of every layer; heads before slots.

    With slots before heads XLA on CPU transposes the whole cache at every step: 25 ms instead of 4
    for one layer of 8 rows × 2,048 slots × 4 heads × 64.
    """

    keys: tuple[Array, ...] | Array  # one [B K S H] per layer; [L B K S H] where layers are scanned
    values: tuple[Array, ...] | Array  # the same


def init_cache(
    arch: ArchConfig | LinearMapConfig,
    *,
    batch_size: int,
    capacity: int,
    dtype: DTypeLike,
    scan_layers: bool = False,
) -> KVCache:
    """An empty cache.

    Args:
        arch: The decoder's architecture; a linear map has no layers, so its cache is empty.
        batch_size: Rows, B.
        capacity: Slots per row, S, in tokens: prompt plus everything generated.
        dtype: Of keys and values; usually the compute dtype.
        scan_layers: Stack the layers, for a decoder built with `scan_layers`.

    Returns:
        Zeros, one `[B K S H]` per layer, or `[L B K S H]` stacked.
    """
    shape = (batch_size, arch.num_key_value_heads, capacity, arch.head_dim)
    if scan_layers:
        stacked = (arch.num_hidden_layers, *shape)
        return KVCache(jnp.zeros(stacked, dtype), jnp.zeros(stacked, dtype))
    layers = range(arch.num_hidden_layers)
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for _ in layers),
        tuple(jnp.zeros(shape, dtype) for _ in layers),
    )


def cache_capacity(cache: KVCache) -> int:
    """Slots per row of the cache, S, in tokens."""
    return cache.keys[0].shape[-2]


def write_slots(
    cached: Float[Array, "B K S H"], new: Float[Array, "B K T H"], slots: Int[Array, "B T"]
) -> Float[Array, "B K S H"]:
    """Write row b's token t into slot `slots[b, t]`; tokens beyond the capacity are dropped."""
    rows, slots, updates = _scattered(cached, new, slots)
    return cached.at[rows, :, slots].set(updates, mode="drop")


def write_stacked_slots(
    cached: Float[Array, "L B K S H"],
    new: Float[Array, "B K T H"],
    slots: Int[Array, "B T"],
    *,
    layer: Int[Array, ""],
) -> Float[Array, "L B K S H"]:
    """`write_slots` into one layer of a stacked cache; in place if the cache is a loop's carry."""
    rows, slots, updates = _scattered(cached, new, slots)
    return cached.at[layer, rows, :, slots].set(updates, mode="drop")


def _scattered(cached: Array, new: Array, slots: Array) -> tuple[Array, Array, Array]:
    """Row and slot indices, and the updates, [B T K H]."""
    rows = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
    updates = new.astype(cached.dtype).swapaxes(1, 2)
    if slots.size == 1:
        # XLA turns a scatter to a single slot into a slice update, fuses it into both its uses and
        # copies the cache four times. A second, dropped slot beyond the capacity keeps it in place.
        nowhere = jnp.full_like(slots, cached.shape[-2])
        slots = jnp.concatenate([slots, nowhere], axis=1)
        updates = jnp.concatenate([updates, updates], axis=1)
    return rows, slots, updates


def visible_slots(
    positions: Int[Array, "B T"], *, capacity: int, window: int | None
) -> Bool[Array, "B 1 T S"]:
    """The slots each query sees: s ≤ p, and p − s < window if the layer has one."""
    slots = jnp.arange(capacity, dtype=positions.dtype)
    distance = positions[:, None, :, None] - slots[None, None, None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
