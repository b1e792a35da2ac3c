"""How a batch of rows is sharded over a mesh.

In: a `Composition` on a mesh, or on one device. Out: shardings of a `DecodeState`.

A cache [B K S H] is split into rows over data × fsdp and into kv heads over the axis that splits
these. Where this axis has more ways than divide the heads, the rest of it splits rows: 4 heads on 8
ways are 4 × 2 parts, each of one head of half of the rows.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ivl_jax.composed.forward import Caches
from ivl_jax.composed.network import Composition, Network
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.state import DecodeState, SpeculationState
from ivl_jax.sharding import BATCH_AXES, batch_ways, replicated

_ROWS_AXIS = "rows"


def state_shardings(composition: Composition, proposer: Proposer | None) -> DecodeState | None:
    """Caches as `cache_sharding` says. The rest: whole.

    Args:
        composition: the static half.
        proposer: where proposals come from, if anywhere.

    Returns:
        The shardings, as a prefix of a state; None on one device.
    """
    if composition.base.layout is None:
        return None
    whole = replicated(composition.base.layout.mesh)
    shardings: dict[str, Any] = dict.fromkeys(DecodeState._fields, whole)
    values: Any = tuple(map(cache_sharding, composition.values))
    base: Any = cache_sharding(composition.base)
    shardings["caches"] = Caches(base, values)
    shardings["speculation"] = None
    if proposer is not None:
        parts: dict[str, Any] = dict.fromkeys(SpeculationState._fields, whole)
        parts["proposer"] = proposer.shardings(composition)
        shardings["speculation"] = SpeculationState(**parts)
    return DecodeState(**shardings)


def cache_sharding(network: Network) -> NamedSharding:
    """Of a network's cache [B K S H]: rows over data × fsdp, kv heads and rows over their axis."""
    layout, ways = network.layout, _ways(network)
    assert layout is not None
    mesh, axis = layout.mesh, layout.rules.kv_heads
    if axis is None or ways.rows == 1:
        return NamedSharding(mesh, PartitionSpec(BATCH_AXES, axis, None, None))
    if ways.heads == 1:
        return NamedSharding(mesh, PartitionSpec((*BATCH_AXES, axis), None, None, None))
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    place = mesh.axis_names.index(axis)
    sizes[place : place + 1] = [ways.heads, ways.rows]
    names = [*mesh.axis_names[: place + 1], _ROWS_AXIS, *mesh.axis_names[place + 1 :]]
    same_devices = Mesh(
        mesh.devices.reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names)
    )
    rows = (*BATCH_AXES, _ROWS_AXIS)
    return NamedSharding(same_devices, PartitionSpec(rows, axis, None, None))


def row_multiple(composition: Composition) -> int:
    """The number of rows of a batch is a multiple of this, so that every cache can be split."""
    draft = () if composition.draft is None else (composition.draft,)
    each = (composition.base, *composition.values, *draft)
    return math.lcm(
        *(
            batch_ways(network.layout.mesh) * _ways(network).rows
            for network in each
            if network.layout is not None
        )
    )


def replicated_cache(network: Network) -> str | None:
    """What it costs that several devices hold the same cache of a network.

    Args:
        network: one of a composition.

    Returns:
        A sentence with bytes per device; None where its cache is split over all devices.
    """
    layout, arch = network.layout, network.arch
    if layout is None or not arch.num_hidden_layers:
        return None
    copies = layout.mesh.size // (batch_ways(layout.mesh) * math.prod(_ways(network)))
    if copies == 1:
        return None
    numbers = 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim
    token = numbers * jnp.dtype(network.cache_dtype).itemsize
    return (
        f"{copies} devices hold the same cache: {token:,} bytes per token and row on each of them, "
        f"instead of {token // copies:,}; 8 rows of 4,096 tokens take {8 * 4096 * token:,} bytes"
    )


class _Ways(NamedTuple):
    """Into how many parts the kv heads' mesh axis splits a cache."""

    heads: int
    rows: int


def _ways(network: Network) -> _Ways:
    layout = network.layout
    assert layout is not None
    axis = layout.rules.kv_heads
    ways = layout.mesh.shape[axis] if axis else 1
    heads = math.gcd(network.arch.num_key_value_heads, ways)
    return _Ways(heads, ways // heads)
