"""Runs a decoder's layers: unrolled or as a `lax.scan`, with or without a cache.

In: embeddings `[B T D]`, positions, segments. Out: the residual stream after the last layer (and
after some before it, where asked for) and the new cache. Rotations and masks are made once per kind
of layer and shared; a scanned layer selects its own inside the rematerialised function, so that no
layer keeps a mask for the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.attention.entry import attend_to_own
from ivl_jax.model.attention.form import AttentionForm
from ivl_jax.model.attention.plain import attend
from ivl_jax.model.attention.visibility import own_mask
from ivl_jax.model.cache_writes import CacheWrite
from ivl_jax.model.kv_cache import (
    KVCache,
    layer_capacity,
    visible_slots,
)
from ivl_jax.model.layers import Attend, Constrain, Decoder, Memory, Write
from ivl_jax.model.remat import rematerialised
from ivl_jax.model.rope import Rotation, no_rotation, rotation

_Kind = tuple[str, bool]
"""A layer's attention span, and whether it rotates queries and keys."""
# (layer state, residual stream, context, kind, memory, layer) → (residual stream, memory)
_Step = Callable[[Any, Array, "_Context", Any, Memory, Array | None], tuple[Array, Memory]]


class _Context(NamedTuple):
    """What all layers of a call share; each layer selects the entry of its kind."""

    rotations: tuple[Rotation, ...] | Rotation  # one per kind; stacked where layers are scanned
    masks: tuple[Array, ...] | Array | None  # likewise, [#B 1 T S]; None: the form needs no masks
    segment_ids: Array | None  # [B T], for forms without masks
    cache_write: CacheWrite | None  # where this call's tokens go; None: no cache


def run_layers(
    decoder: Decoder,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    cache: KVCache | None,
    prompt_lengths: Int[Array, " B"] | None,
    constrain: Constrain,
    late: int = 0,
) -> tuple[Float[Array, "B T D"], tuple[Array, ...], KVCache | None]:
    """The residual stream after every layer, and the cache with this call's keys and values.

    Args:
        decoder: Module with its parameters.
        x: Embeddings in the compute dtype.
        positions: See `decoder.hidden_states`, also for the rest.
        segment_ids: Sequences packed in a row.
        cache: Keys and values of earlier calls.
        prompt_lengths: Of rows that begin; the cache is then written only.
        constrain: Adds sharding constraints.
        late: Layers before the last whose outputs are wanted too.

    Returns:
        Residual stream before the final norm; that after each of the `late` layers before the last,
        in their order; and the new cache (None without one).
    """
    arch = decoder.arch
    of_layers: list[_Kind] = list(zip(arch.layer_types, arch.rotates, strict=True))
    kinds = sorted(set(of_layers))
    rotations = [_rotation(arch, kind, positions) for kind in kinds]
    masks, form = None, decoder.attention
    windows = [_window(arch, kind) for kind in kinds]
    if cache is not None and prompt_lengths is None:
        slots = [layer_capacity(cache, of_layers.index(kind)) for kind in kinds]
        masks = tuple(
            visible_slots(positions, capacity=capacity, window=window)
            for capacity, window in zip(slots, windows, strict=True)
        )
    elif form.at_length(x.shape[1]) == "plain":
        masks = tuple(own_mask(x.shape[1], segment_ids, window) for window in windows)
    cache_write = None
    if cache is not None:
        cache_write = CacheWrite(positions, prompt_lengths)
    context = _Context(tuple(rotations), masks, segment_ids, cache_write)
    step = _step(decoder, windows, constrain)
    kind_of_layer = [kinds.index(kind) for kind in of_layers]
    run = _run_scanned if decoder.scan_layers else _run_unrolled
    return run(decoder, x, context, step, kind_of_layer, cache, late)


def _rotation(arch: ArchConfig, kind: _Kind, positions: Array) -> Rotation:
    span, rotates = kind
    rope = arch.rope_parameters
    if span == "sliding_attention" and arch.sliding_rope_parameters is not None:
        rope = arch.sliding_rope_parameters
    found = rotation(positions, rope, head_dim=arch.head_dim)
    return found if rotates else no_rotation(found)


def _window(arch: ArchConfig, kind: _Kind) -> int | None:
    return arch.sliding_window if kind[0] == "sliding_attention" else None


def _step(
    decoder: Decoder,
    windows: Sequence[int | None],
    constrain: Constrain,
) -> _Step:
    """One layer as a pure function, rematerialised as the decoder says."""
    structure = nnx.split(decoder.layers if decoder.scan_layers else decoder.layers[0])[0]

    def step(
        state: Any,  # nnx.State, about whose annotation beartype warns
        x: Array,
        context: _Context,
        kind: Any,  # an int, or an index that a scan traces
        memory: Memory,
        layer: Array | None,  # its index in stacked arrays
    ) -> tuple[Array, Memory]:
        rotation = _pick(context.rotations, kind)
        if context.masks is not None:
            attend = _attend_under(_pick(context.masks, kind))
        else:
            attend = _attend_to_own(decoder.attention, context.segment_ids, windows, kind)
        return nnx.merge(structure, state)(
            x,
            rotation=rotation,
            attend=attend,
            memory=memory,
            write=_write(context.cache_write, layer, windows, kind, decoder.attention),
            constrain=constrain,
        )

    scanned = decoder.scan_layers
    static = () if scanned else (3,)
    return rematerialised(step, decoder.remat, scanned=scanned, static_argnums=static)


def _pick(each: Any, kind: Any) -> Any:
    """The entry of one kind of layer: of a tuple, or of stacked arrays by a traced index."""
    if isinstance(kind, int):
        return each[kind]
    return jax.tree.map(lambda stacked: stacked[kind], each)


def _attend_under(mask: Array) -> Attend:
    def attend_under(
        query: Array, keys: Array, values: Array, scale: float, softcap: float | None
    ) -> Array:
        return attend(query, keys, values, mask=mask, scale=scale, softcap=softcap)

    return attend_under


def _attend_to_own(
    form: AttentionForm, segment_ids: Array | None, windows: Sequence[int | None], kind: Any
) -> Attend:
    """Attention without a mask; kernels are made for a window, so a traced kind is a switch."""

    def attend_with(
        query: Array, keys: Array, values: Array, scale: float, softcap: float | None
    ) -> Array:
        def in_window(window: int | None) -> Callable[[Array, Array, Array], Array]:
            return lambda *arrays: attend_to_own(
                *arrays,
                form=form,
                segment_ids=segment_ids,
                window=window,
                scale=scale,
                softcap=softcap,
            )

        different = list(dict.fromkeys(windows))
        if isinstance(kind, int):
            return in_window(windows[kind])(query, keys, values)
        if len(different) == 1:
            return in_window(different[0])(query, keys, values)
        place = jnp.asarray([different.index(window) for window in windows])[kind]
        return jax.lax.switch(place, [in_window(each) for each in different], query, keys, values)

    return attend_with


def _write(
    cache_write: CacheWrite | None,
    layer: Array | None,
    windows: Sequence[int | None],
    kind: Any,
    form: AttentionForm,
) -> Write:
    if cache_write is None:
        return lambda memory, keys, values: (memory, keys, values)
    # Stacked layers have one capacity and no rings.
    window = windows[kind] if isinstance(kind, int) else None
    return cache_write.into(layer, window=window, by_head=form.writes_by_head)


def _run_unrolled(
    decoder: Decoder,
    x: Array,
    context: _Context,
    step: _Step,
    kind_of_layer: list[int],
    cache: KVCache | None,
    late: int,
) -> tuple[Array, tuple[Array, ...], KVCache | None]:
    # Equal layers are traced once (pair A's prefill: 0.4 s, not 1.3 s); XLA inlines the calls.
    step = jax.jit(step, static_argnums=3)
    memories, kept = [], []
    for layer, kind in enumerate(kind_of_layer):
        memory = None if cache is None else (cache.keys[layer], cache.values[layer])
        state = nnx.split(decoder.layers[layer])[1]
        x, memory = step(state, x, context, kind, memory, None)
        memories.append(memory)
        kept = [*kept, x][-late - 1 :]
    outputs = tuple(kept[:-1])
    if cache is None:
        return x, outputs, None
    keys, values = zip(*memories, strict=True)
    return x, outputs, KVCache(keys, values)


def _run_scanned(
    decoder: Decoder,
    x: Array,
    context: _Context,
    step: _Step,
    kind_of_layer: list[int],
    cache: KVCache | None,
    late: int,
) -> tuple[Array, tuple[Array, ...], KVCache | None]:
    context = _stack_kinds(context)

    # The whole cache is the carry: as scan inputs and outputs it would be copied at each call.
    # So are the late outputs: as scan outputs, those of all layers would be stored.
    first = len(kind_of_layer) - 1 - late

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        state, kind, layer = inputs
        x, memory, kept = carry
        x, memory = step(state, x, context, kind, memory, layer)
        kept = tuple(jnp.where(layer == first + at, x, old) for at, old in enumerate(kept))
        return (x, memory, kept), None

    state = nnx.split(decoder.layers)[1]
    kinds = jnp.asarray(kind_of_layer)
    memory = None if cache is None else tuple(cache)
    inputs = (state, kinds, jnp.arange(len(kind_of_layer)))
    (x, memory, kept), _ = jax.lax.scan(body, (x, memory, (x,) * late), inputs)
    return x, kept, None if memory is None else KVCache(*memory)


def _stack_kinds(context: _Context) -> _Context:
    """With a leading axis of kinds, which a traced index can pick from."""
    rotations = jax.tree.map(lambda *parts: jnp.stack(parts), *context.rotations)
    masks = None if context.masks is None else jnp.stack(context.masks)
    return context._replace(rotations=rotations, masks=masks)
