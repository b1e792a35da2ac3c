"""Arrays on disk: any pytree as nested string dictionaries of plain arrays, written by Orbax.

In: a pytree of arrays (NamedTuples, optax states, typed PRNG keys), or its structure. Out: an Orbax
item that plain Orbax can read too, and the same pytree back, each leaf created in its final place.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from ivl_jax.tree_compare import check_same_tree, key_name, named_leaves


def to_storable(tree: Any) -> dict[str, Any]:
    """Turn a pytree into nested dictionaries with string keys.

    Field names, dictionary keys and indices become the keys, so the structure on disk does not
    depend on any Python class; nodes without leaves are dropped. Typed PRNG keys become their
    uint32 data.

    Args:
        tree: pytree of arrays or `ShapeDtypeStruct`s; not a single array.

    Returns:
        The same leaves in nested dictionaries.
    """
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = (key_name(key) for key in path)
        node = nested
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = _plain(leaf)
    return nested


def from_storable(nested: Mapping[str, Any], target: Any) -> Any:
    """Undo `to_storable`.

    Args:
        nested: nested dictionaries of arrays, as stored.
        target: the pytree that was stored, or its `ShapeDtypeStruct`s.

    Returns:
        A pytree of the target's structure; typed PRNG keys where the target has them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    restored = []
    for path, leaf in leaves:
        node: Any = nested
        for key in path:
            node = node[key_name(key)]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            node = jax.random.wrap_key_data(node, impl=_key_impl(leaf))
        restored.append(node)
    return jax.tree.unflatten(structure, restored)


def restore_arrays(
    folder: epath.PathLike,
    target: Any,
    *,
    what: str,
    remedy: str,
    stored_like: Any = None,
    cast: bool = False,
    partial: bool = False,
) -> Any:
    """Read stored arrays as a given pytree, each leaf directly onto its devices.

    The stored tree's paths, shapes and dtypes are compared first; no array is read before they fit.

    Args:
        folder: the Orbax item.
        target: pytree of arrays or `ShapeDtypeStruct`s; a leaf without a sharding goes to the first
            device of this process.
        what: the subject of an error's first line.
        remedy: what to do when the trees differ.
        stored_like: the expected stored tree, if it is smaller than the target in some dimensions,
            which are then padded with zeros at the end. None: the same as the target.
        cast: convert floating-point leaves to the target's dtype instead of requiring it.
        partial: read only the target's top-level entries, for example the parameters of a train
            state; other stored entries are ignored.

    Returns:
        The pytree of arrays, with the target's structure and shardings.

    Raises:
        TreeMismatchError: paths, shapes or (without `cast`) dtypes differ; lists them.
    """
    folder = epath.Path(folder)
    wanted = to_storable(jax.tree.map(_abstract, target))
    expected = wanted if stored_like is None else to_storable(stored_like)
    stored = stored_leaves(folder)
    if partial:
        stored = {name: leaf for name, leaf in stored.items() if name.split(".")[0] in wanted}
    check_same_tree(named_leaves(expected), stored, what=what, remedy=remedy, with_dtype=not cast)

    def arguments(leaf: jax.ShapeDtypeStruct, kept: Any) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
            strict=leaf.shape == kept.shape,
        )

    nested = _read(folder, wanted, jax.tree.map(arguments, wanted, expected), partial=partial)
    return from_storable(nested, target)


def read_host_arrays(folder: epath.PathLike, entry: str) -> Any:
    """Read one top-level entry of stored arrays into host memory, not onto a device.

    Args:
        folder: the Orbax item.
        entry: the entry's name, for example `params`.

    Returns:
        Nested string dictionaries of NumPy arrays (or one array), in the stored dtypes.

    Raises:
        KeyError: the item has no such entry.
    """
    folder = epath.Path(folder)
    tree = _stored_tree(folder)[entry]
    wanted = {entry: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)}
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    return _read(folder, wanted, arguments, partial=True)[entry]


def stored_leaves(folder: epath.PathLike) -> dict[str, Any]:
    """List the arrays of an Orbax item, without reading them.

    Args:
        folder: the Orbax item.

    Returns:
        Dotted path → metadata with shape and dtype.
    """
    return named_leaves(_stored_tree(epath.Path(folder)))


def _stored_tree(folder: epath.Path) -> dict[str, Any]:
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return handler.metadata(folder).tree
    finally:
        handler.close()


def _read(folder: epath.Path, item: Any, restore_args: Any, *, partial: bool) -> dict[str, Any]:
    handler = ocp.PyTreeCheckpointHandler()
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=restore_args, partial_restore=partial
    )
    try:
        return handler.restore(folder, args=arguments)
    finally:
        handler.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Describe the array to be read for a leaf; without a sharding it goes to the first device."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _plain(leaf: Any) -> Any:
    """A leaf as Orbax stores it: arrays unchanged, typed keys as their uint32 data."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _key_impl(leaf: Any) -> Any:
    """Find the PRNG implementation of a typed key or of its abstract form."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]
