"""How a call's keys and values get into a layer's cache.

In: a layer's cache, or the stacked cache of all layers, and new keys or values. Out: the cache with
them. A call either reads the first tokens of every row, which are all that the cache then holds, or
adds a few tokens at each row's own place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ivl_jax.model.kv_cache import is_ring
from ivl_jax.model.layers import Memory, Write


class CacheWrite(NamedTuple):
    """Where a call's tokens go."""

    positions: Int[Array, "B T"]
    """Of each token; those beyond the capacity are dropped."""
    prompt_lengths: Int[Array, " B"] | None
    """Real tokens of each row, where these are its first, at the positions 0, 1, …"""

    def into(self, layer: Int[Array, ""] | None, *, window: int | None, by_head: bool) -> Write:
        """The function for one layer.

        Args:
            layer: Its index in a stacked cache; None: it has a cache of its own.
            window: The most keys that a query sees; None: no limit.
            by_head: See `write_slots`.

        Returns:
            (cached keys and values, new keys, new values) → (cached ones afterwards, the keys and
            values that the call's queries may see).
        """
        lengths = self.prompt_lengths

        def begin(memory: Memory, keys: Array, values: Array) -> tuple[Memory, Array, Array]:
            assert lengths is not None
            pairs = zip(memory, (keys, values), strict=True)
            held = tuple(write_prompts(old, new, lengths, layer=layer) for old, new in pairs)
            # The queries see the keys of this call only.
            return held, keys, values

        def add(memory: Memory, keys: Array, values: Array) -> tuple[Memory, Array, Array]:
            slots, capacity = self.positions, memory[0].shape[-2]
            if layer is None and is_ring(capacity, window):
                slots = slots % capacity
            held_keys, held_values = (
                write_slots(old, new, slots, layer=layer, by_head=by_head)
                for old, new in zip(memory, (keys, values), strict=True)
            )
            held = (held_keys, held_values)
            if layer is None:
                return held, held_keys, held_values
            return held, held_keys[layer], held_values[layer]

        return add if lengths is None else begin


def write_prompts(
    cached: Float[Array, "*L B K S H"],
    new: Float[Array, "B K T H"],
    lengths: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*L B K S H"]:
    """Write every row's first tokens, position p into slot p mod S.

    Args:
        cached: One layer's keys or values, or those of all layers.
        new: What is written. Of more tokens than slots, each row's last S real ones are.
        lengths: Real tokens of each row.
        layer: The layer in a stacked cache.

    Returns:
        The cache with them; slots that get no real token hold padding or what they held.
    """
    slots = cached.shape[-2]
    if new.shape[2] > slots:
        last = lengths[:, None] - 1
        kept = last - (last - jnp.arange(slots, dtype=lengths.dtype)[None, :]) % slots
        new = jnp.take_along_axis(new, jnp.maximum(kept, 0)[:, None, :, None], axis=2)
    updates = new.astype(cached.dtype)
    if layer is None:
        return jax.lax.dynamic_update_slice(cached, updates, (0, 0, 0, 0))
    return jax.lax.dynamic_update_slice(cached, updates[None], (layer, 0, 0, 0, 0))


def write_slots(
    cached: Float[Array, "*L B K S H"],
    new: Float[Array, "B K T H"],
    slots: Int[Array, "B T"],
    *,
    layer: Int[Array, ""] | None = None,
    by_head: bool = False,
) -> Float[Array, "*L B K S H"]:
    """Write row b's token t into slot `slots[b, t]`; tokens beyond the capacity are dropped.

    Args:
        cached: One layer's keys or values, or those of all layers.
        new: What is written.
        slots: Where.
        layer: The layer in a stacked cache, which is written in place if it is a loop's carry.
        by_head: Index heads too, so that each write is one contiguous vector. Otherwise the TPU
            compiler puts slots before heads for the write and after them for attention, and copies
            the caches: 64 rows of 4,096 slots took 2.0 times their bytes, and with this 1.0. On CPU
            the writes are a sequential loop, which is K times as long with this.

    Returns:
        The cache with them.
    """
    rows = jnp.arange(slots.shape[0], dtype=slots.dtype)
    stacked = () if layer is None else (layer,)
    updates = new.astype(cached.dtype)
    if by_head:
        heads = jnp.arange(new.shape[1], dtype=slots.dtype)
        where = (*stacked, rows[:, None, None], heads[None, :, None], slots[:, None, :])
        return cached.at[where].set(updates, mode="drop")
    updates = updates.swapaxes(1, 2)
    if slots.size == 1:
        # XLA on CPU turns a scatter to a single slot into a slice update, fuses it into both its
        # uses and copies the cache four times. A second, dropped slot beyond the capacity keeps it
        # in place.
        nowhere = jnp.full_like(slots, cached.shape[-2])
        slots = jnp.concatenate([slots, nowhere], axis=1)
        updates = jnp.concatenate([updates, updates], axis=1)
    return cached.at[(*stacked, rows[:, None], slice(None), slots)].set(updates, mode="drop")
