"""Runs a decoder's layers: unrolled or as a `lax.scan`, with or without a cache.

In: embeddings `[B T D]`, positions, segments. Out: the residual stream after the last layer and the
new cache. Rotations and masks are made once per kind of layer and shared.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.kv_cache import (
    KVCache,
    cache_capacity,
    visible_slots,
    write_slots,
    write_stacked_slots,
)
from ivl_jax.model.layers import Constrain, Decoder, Memory, Write
from ivl_jax.model.rope import Rotation, no_rotation, rotation

_Kind = tuple[str, bool]
"""A layer's attention span, and whether it rotates queries and keys."""
# (layer state, residual stream, rotation, mask, memory, slots, layer) → (residual stream, memory)
_Step = Callable[[Any, Array, Rotation, Array, Memory, Array, Array], tuple[Array, Memory]]


def run_layers(
    decoder: Decoder,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    cache: KVCache | None,
    constrain: Constrain,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """The residual stream after every layer, and the cache with this call's keys and values.

    Args:
        decoder: Module with its parameters.
        x: Embeddings in the compute dtype.
        positions: See `decoder.hidden_states`, also for the rest.
        segment_ids: Sequences packed in a row.
        cache: Keys and values of earlier calls.
        constrain: Adds sharding constraints.

    Returns:
        Residual stream before the final norm, and the new cache (None without one).
    """
    arch = decoder.arch
    of_layers: list[_Kind] = list(zip(arch.layer_types, arch.rotates, strict=True))
    kinds = sorted(set(of_layers))
    rotations = [_rotation(arch, kind, positions) for kind in kinds]
    masks = [_mask(arch, kind, positions, segment_ids, cache) for kind in kinds]
    kind_of_layer = [kinds.index(kind) for kind in of_layers]
    run = _run_scanned if decoder.scan_layers else _run_unrolled
    return run(decoder, x, rotations, masks, kind_of_layer, positions, cache, constrain)


def _rotation(arch: ArchConfig, kind: _Kind, positions: Array) -> Rotation:
    span, rotates = kind
    rope = arch.rope_parameters
    if span == "sliding_attention" and arch.sliding_rope_parameters is not None:
        rope = arch.sliding_rope_parameters
    found = rotation(positions, rope, head_dim=arch.head_dim)
    return found if rotates else no_rotation(found)


def _mask(
    arch: ArchConfig,
    kind: _Kind,
    positions: Array,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> Bool[Array, "_ 1 T S"]:
    window = arch.sliding_window if kind[0] == "sliding_attention" else None
    if cache is not None:
        return visible_slots(positions, capacity=cache_capacity(cache), window=window)
    # Within a sequence the distance of two indices equals that of their positions.
    index = jnp.arange(positions.shape[1])[None]
    visible = visible_slots(index, capacity=positions.shape[1], window=window)
    if segment_ids is None:
        return visible
    return visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def _step(decoder: Decoder, write: Callable[[Array, Array], Write], constrain: Constrain) -> _Step:
    """One layer as a pure function, rematerialised if asked."""
    structure = nnx.split(decoder.layers if decoder.scan_layers else decoder.layers[0])[0]

    def step(
        state: Any,  # nnx.State, about whose annotation beartype warns
        x: Array,
        rotation: Rotation,
        mask: Array,
        memory: Memory,
        slots: Array,
        layer: Array,
    ) -> tuple[Array, Memory]:
        return nnx.merge(structure, state)(
            x,
            rotation=rotation,
            mask=mask,
            memory=memory,
            write=write(slots, layer),
            constrain=constrain,
        )

    # Inside a scan XLA cannot merge the forward and the recomputed pass anyway.
    return jax.checkpoint(step, prevent_cse=not decoder.scan_layers) if decoder.remat else step


def _write_nothing(slots: Array, layer: Array) -> Write:
    del slots, layer
    return lambda memory, keys, values: (memory, keys, values)


def _run_unrolled(
    decoder: Decoder,
    x: Array,
    rotations: list[Rotation],
    masks: list[Array],
    kind_of_layer: list[int],
    positions: Array,
    cache: KVCache | None,
    constrain: Constrain,
) -> tuple[Array, KVCache | None]:
    def write(slots: Array, layer: Array) -> Write:
        del layer

        def into_cache(memory: Memory, keys: Array, values: Array) -> tuple[Memory, Array, Array]:
            all_keys = write_slots(memory[0], keys, slots)
            all_values = write_slots(memory[1], values, slots)
            return (all_keys, all_values), all_keys, all_values

        return into_cache

    # Equal layers are traced once (pair A's prefill: 0.4 s, not 1.3 s); XLA inlines the calls.
    step = jax.jit(_step(decoder, _write_nothing if cache is None else write, constrain))
    memories = []
    for layer, kind in enumerate(kind_of_layer):
        memory = None if cache is None else (cache.keys[layer], cache.values[layer])
        state = nnx.split(decoder.layers[layer])[1]
        index = jnp.asarray(layer)
        x, memory = step(state, x, rotations[kind], masks[kind], memory, positions, index)
        memories.append(memory)
    if cache is None:
        return x, None
    return x, KVCache(tuple(keys for keys, _ in memories), tuple(values for _, values in memories))


def _run_scanned(
    decoder: Decoder,
    x: Array,
    rotations: list[Rotation],
    masks: list[Array],
    kind_of_layer: list[int],
    positions: Array,
    cache: KVCache | None,
    constrain: Constrain,
) -> tuple[Array, KVCache | None]:
    def write(slots: Array, layer: Array) -> Write:
        def into_cache(memory: Memory, keys: Array, values: Array) -> tuple[Memory, Array, Array]:
            all_keys = write_stacked_slots(memory[0], keys, slots, layer=layer)
            all_values = write_stacked_slots(memory[1], values, slots, layer=layer)
            return (all_keys, all_values), all_keys[layer], all_values[layer]

        return into_cache

    step = _step(decoder, _write_nothing if cache is None else write, constrain)
    all_rotations = jax.tree.map(lambda *parts: jnp.stack(parts), *rotations)
    all_masks = jnp.stack(masks)

    # The whole cache is the carry: as scan inputs and outputs it would be copied at each call.
    def body(carry: tuple[Array, Memory], inputs: tuple) -> tuple[tuple[Array, Memory], None]:
        state, kind, layer = inputs
        x, memory = carry
        rotation = Rotation(*(part[kind] for part in all_rotations))
        return step(state, x, rotation, all_masks[kind], memory, positions, layer), None

    state = nnx.split(decoder.layers)[1]
    kinds = jnp.asarray(kind_of_layer)
    memory = None if cache is None else tuple(cache)
    inputs = (state, kinds, jnp.arange(len(kind_of_layer)))
    (x, memory), _ = jax.lax.scan(body, (x, memory), inputs)
    return x, None if memory is None else KVCache(*memory)
