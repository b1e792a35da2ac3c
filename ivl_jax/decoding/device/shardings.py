"""How a batch of rows is sharded over a mesh.

In: a `Composition` on a mesh, or on one device. Out: shardings of a `DecodeState`.
"""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from ivl_jax.composed.forward import Caches
from ivl_jax.composed.network import Composition, Network
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.state import DecodeState, SpeculationState
from ivl_jax.sharding import BATCH_AXES, replicated


def state_shardings(composition: Composition, proposer: Proposer | None) -> DecodeState | None:
    """Caches: rows over data × fsdp, kv heads as the network's layout says. The rest: whole.

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
    """Of a network's cache [B K S H]: rows over data × fsdp, kv heads where they divide."""
    layout = network.layout
    assert layout is not None
    axis = layout.rules.kv_heads
    if axis and network.arch.num_key_value_heads % layout.mesh.shape[axis]:
        axis = None
    return NamedSharding(layout.mesh, PartitionSpec(BATCH_AXES, axis, None, None))
