"""Runs an attention kernel on every device of a mesh, over its own rows and heads.

In: a kernel, and arrays on a mesh. Out: the kernel's result, sharded like the queries. XLA cannot
split a kernel on its own; without this every device would compute everything.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ivl_jax.model.attention.form import AttentionForm

Kernel = Callable[[Array, Array, Array, Array], Array]
"""(queries [B T N H], keys [B K T H], values, segment ids [B T]) → [B T N H]"""


def run_over_mesh(
    kernel: Kernel,
    form: AttentionForm,
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Run a kernel on each device's share.

    Rows or heads that do not divide over their axes stay whole on every device. Where only the
    key-value heads do not divide, each is repeated until they do: 4 heads on 8 devices become 8.

    Args:
        kernel: Sees only a device's own rows and heads.
        form: The mesh and its axes.
        query: Rotated queries.
        keys: Rotated keys, heads first.
        values: Values, heads first.
        segment_ids: One per token.

    Returns:
        The attended values.
    """
    mesh = form.mesh
    if mesh is None or mesh.size == 1:
        return kernel(query, keys, values, segment_ids)
    heads, kv_heads = query.shape[2], keys.shape[1]
    ways = 1 if form.head_axis is None else mesh.shape[form.head_axis]
    shared = math.lcm(kv_heads, ways)
    head_axis = form.head_axis if ways > 1 and heads % shared == 0 else None
    if head_axis is not None and shared > kv_heads:
        keys, values = (jnp.repeat(x, shared // kv_heads, axis=1) for x in (keys, values))
    row_ways = math.prod(mesh.shape[axis] for axis in form.batch_axes)
    rows = form.batch_axes if row_ways > 1 and query.shape[0] % row_ways == 0 else None
    by_query = PartitionSpec(rows, None, head_axis, None)
    by_key = PartitionSpec(rows, head_axis, None, None)
    run = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(by_query, by_key, by_key, PartitionSpec(rows, None)),
        out_specs=by_query,
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return run(query, keys, values, segment_ids)
