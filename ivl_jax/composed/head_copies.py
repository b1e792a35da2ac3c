"""A copy of a head for each group of rows, so that its gradient is summed locally first.

The rows of a batch are split over the data-parallel devices, so the gradient of a shared head is a
sum over all of them: an all-reduce of D × V numbers wherever a gradient is taken, in a scan over
chunks of positions once per chunk. With one copy per group of rows each device adds up the gradient
of its own copy, and the sum over copies follows once, after the scan.

In: a head. Out: its copies [W …], W the number of groups, each on its own devices; and logits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from ivl_jax.composed.network import Network
from ivl_jax.model.decoder import Params, logits_from_hidden
from ivl_jax.sharding import batch_ways, parameter_shardings

_AXES = ("batch", "embed", "vocabulary")


def copy_head(network: Network, head: Params, *, rows: int) -> Params:
    """Make the copies; the gradient of a copy is that of its rows only.

    Each device holds one copy that is split over the vocabulary at most, in place of its share
    under fsdp, and later a gradient of that size in float32.

    Args:
        network: the network whose head it is.
        head: `{"lm_head": …}`, differentiable.
        rows: of the batch.

    Returns:
        Copies, or the head itself where rows are not split or do not divide evenly.
    """
    layout = network.layout
    ways = 1 if layout is None else batch_ways(layout.mesh)
    if layout is None or ways == 1 or rows % ways:
        return head
    # So that the sum of the copies' gradients is sharded like the head at once.
    places = parameter_shardings(head, layout.mesh, layout.rules)
    head = jax.lax.with_sharding_constraint(head, places)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (ways, *leaf.shape)), head)


def holds_copies(params: Params) -> bool:
    """Whether the head among these parameters is one that `copy_head` copied."""
    return any(leaf.ndim == len(_AXES) for leaf in jax.tree.leaves(params.get("lm_head", {})))


def logits_of_copies(
    network: Network, params: Params, hidden: Float[Array, "B T D"]
) -> Float32[Array, "B T V"]:
    """Logits of final hidden states, each group of rows by its own copy.

    Args:
        network: the network.
        params: holds the copies; nothing else is read.
        hidden: its final hidden states.

    Returns:
        What `head_logits` returns for the head itself.
    """
    constrain: Any = network.constrain  # copies exist on a mesh only
    copies = jax.tree.map(lambda leaf: constrain(leaf, _AXES), params["lm_head"])
    groups = jax.tree.leaves(copies)[0].shape[0]
    states = hidden.reshape(groups, -1, *hidden.shape[1:])
    states = constrain(states, ("batch", "rows", "length", "embed"))

    def of_group(head: Params, states: Array) -> Array:
        return logits_from_hidden(network.graphdef, {"lm_head": head}, states)

    logits = jax.vmap(of_group)(copies, states)
    logits = constrain(logits, ("batch", "rows", "length", "vocabulary"))
    return logits.reshape(-1, *logits.shape[2:])
