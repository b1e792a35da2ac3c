"""Key-value caches of the tokens that a decoder has read.

In: an architecture, batch size and capacity. Out: a pytree that the decoder reads and writes
(`cache_writes`). The caller keeps each row's length, and rolls back by using a smaller one.

Slot p of a row is position p. A layer with a sliding window may have a ring instead: fewer slots
than the capacity, of which position p takes slot p mod S. It holds the window and `LOOKAHEAD` more,
so that tokens that are read and then rejected overwrite nothing that is still seen.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.linear_map import LinearMapConfig

LOOKAHEAD = 64
"""How far beyond a token that is still to be read a call may write, where layers have rings."""
_RING_MULTIPLE = 128  # a tile's slots on TPU


class KVCache(NamedTuple):
    """Rotated keys, and values, of every layer; heads before slots.

    With slots before heads XLA on CPU transposes the whole cache at every step: 25 ms instead of 4
    for one layer of 8 rows × 2,048 slots × 4 heads × 64.
    """

    # One [B K S H] per layer, S fewer in a ring; [L B K S H] where layers are scanned.
    keys: tuple[Array, ...] | Array
    values: tuple[Array, ...] | Array  # the same


def init_cache(
    arch: ArchConfig | LinearMapConfig,
    *,
    batch_size: int,
    capacity: int,
    dtype: DTypeLike,
    scan_layers: bool = False,
    rings: bool = False,
) -> KVCache:
    """An empty cache.

    Args:
        arch: The decoder's architecture; a linear map has no layers, so its cache is empty.
        batch_size: Rows, B.
        capacity: Slots per row, S, in tokens: prompt plus everything generated.
        dtype: Of keys and values; usually the compute dtype.
        scan_layers: Stack the layers, for a decoder built with `scan_layers`; they have no rings.
        rings: Give layers with a sliding window a ring, where it is shorter than the capacity. The
            caller then adds at most `LOOKAHEAD` tokens in a call, and never returns to a position
            further than that before the last one written.

    Returns:
        Zeros, one `[B K S H]` per layer, or `[L B K S H]` stacked.
    """

    def zeros(slots: int, *stacked: int) -> Array:
        shape = (*stacked, batch_size, arch.num_key_value_heads, slots, arch.head_dim)
        return jnp.zeros(shape, dtype)

    if scan_layers:
        depth = arch.num_hidden_layers
        return KVCache(zeros(capacity, depth), zeros(capacity, depth))
    slots = [capacity] * arch.num_hidden_layers
    if rings and isinstance(arch, ArchConfig) and arch.sliding_window is not None:
        ring = min(capacity, _ring_slots(arch.sliding_window))
        slots = [ring if kind == "sliding_attention" else capacity for kind in arch.layer_types]
    return KVCache(tuple(map(zeros, slots)), tuple(map(zeros, slots)))


def layer_capacity(cache: KVCache, layer: int) -> int:
    """Slots per row of a layer, S, in tokens."""
    keys = cache.keys
    return (keys[layer] if isinstance(keys, tuple) else keys).shape[-2]


def is_ring(slots: int, window: int | None) -> bool:
    """Whether position p takes slot p mod S; in a layer of all positions that is p itself."""
    return window is not None and slots >= window + LOOKAHEAD


def _ring_slots(window: int) -> int:
    return -(-(window + LOOKAHEAD) // _RING_MULTIPLE) * _RING_MULTIPLE


def visible_slots(
    positions: Int[Array, "B T"], *, capacity: int, window: int | None
) -> Bool[Array, "B 1 T S"]:
    """The slots each query sees: those of a position q ≤ p, p − q < window if the layer has one.

    Args:
        positions: Of the queries, which have been written; the last one is a row's newest.
        capacity: Slots of the layer.
        window: The most keys that a query sees; None: no limit.

    Returns:
        True where a query sees a slot.
    """
    slots = jnp.arange(capacity, dtype=positions.dtype)[None, :]
    if not is_ring(capacity, window):
        distance = positions[:, None, :, None] - slots[:, None, None, :]
        visible = distance >= 0
        return visible if window is None else visible & (distance < window)
    assert window is not None
    newest = positions[:, -1:]
    held = newest - (newest - slots) % capacity
    distance = positions[:, None, :, None] - held[:, None, None, :]
    return (held >= 0)[:, None, None, :] & (distance >= 0) & (distance < window)
