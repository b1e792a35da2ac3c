"""Where every array lives: the device mesh, and which mesh axes split each logical axis.

In: shapes and parameter paths. Out: meshes, `NamedSharding`s for parameters and batches, and the
constraint callables that the models take. Modules never name a mesh axis themselves.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ivl_jax.mesh_sizes import mesh_sizes
from ivl_jax.model.network import declared_axes

logger = logging.getLogger(__name__)

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Rows of the vocabulary are padded to a multiple of this on every mesh, so that a run saved on one
# device restores on 64 without changing a shape. Published vocabularies divide by 64 already
# (32,000; 128,256; 151,936; 256,000); GPT-2's 50,257 gains 47 rows.
VOCABULARY_ROW_MULTIPLE = 64

_LAYER_PREFIX = re.compile(r"^layers\.(?:(\d+)\.)?")


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes split each logical axis; None: not split.

    Every matrix has one dimension on `embed` and one on a width axis, so `fsdp` on the first and
    `tensor` on the second split all of them in both directions without a collision. Tensor
    parallelism on heads, MLP width and vocabulary keeps each layer at two all-reduces (Megatron's
    layout); fsdp on `embed` costs one all-gather of a layer's weights just before its use.
    """

    embed: str | None = "fsdp"
    vocabulary: str | None = "tensor"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"

    def __post_init__(self) -> None:
        """Check the mesh axes' names, and that no axis would split a matrix twice."""
        widths = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, axis in widths.items():
            if axis is not None and axis not in MESH_AXES:
                raise ValueError(f"ShardingRules.{name} = {axis!r} is not one of {MESH_AXES}")
        embed = widths.pop("embed")
        clash = [name for name, axis in widths.items() if axis is not None and axis == embed]
        if clash:
            raise ValueError(
                f"ShardingRules puts {embed!r} on embed and on {', '.join(clash)}: a mesh axis can "
                "split only one dimension of an array; choose another axis for one of them"
            )


DEFAULT_RULES = ShardingRules()
NO_UNITS: Mapping[str, int] = MappingProxyType({})

# Base and value may be sharded differently over one mesh: a 1 B value fits on each device, a 70 B
# base does not.
LAYOUTS: Mapping[str, ShardingRules] = MappingProxyType(
    {
        "full": DEFAULT_RULES,
        "fsdp": ShardingRules(vocabulary=None, heads=None, kv_heads=None, mlp=None),
        "tensor": ShardingRules(embed=None),
        "replicated": ShardingRules(None, None, None, None, None),
    }
)


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arrange devices in a mesh with axes (data, fsdp, tensor).

    Args:
        data: copies of the model, each with its own rows of the batch.
        fsdp: devices over which parameters and rows of the batch are split.
        tensor: devices over which heads, MLP width and vocabulary are split.
        devices: the devices to use; None: all of `jax.devices()`.

    Returns:
        The mesh, every axis of type Auto. One size may be −1: all remaining devices. Of a TPU that
        consists of several slices, data spans the slices.

    Raises:
        ValueError: the sizes do not fit the devices; the message lists sizes that do.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = fit_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, available)
    total = math.prod(sizes.values())
    if total < len(available):
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        logger.warning("mesh %s uses %d of %d devices", text, total, len(available))
        available = available[:total]
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    if _slice_count(available) > 1:
        return Mesh(arrange_slices(available, sizes), MESH_AXES, axis_types=axis_types)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=axis_types, devices=available)


def fit_sizes(wanted: Mapping[str, int], devices: Sequence[Any]) -> dict[str, int]:
    """Fit the sizes of a mesh to devices.

    Args:
        wanted: sizes of data, fsdp and tensor; one may be −1.
        devices: the devices.

    Returns:
        The sizes.

    Raises:
        ValueError: they do not fit, leave out devices of several processes, or would split the
            model over the slices of a TPU.
    """
    # A slow network connects the slices of a TPU. GPUs of several hosts have slice numbers too, but
    # their network may carry any axis.
    slices = _slice_count(devices) if devices[0].platform == "tpu" else 1
    several = len({device.process_index for device in devices}) > 1
    return mesh_sizes(wanted, devices=len(devices), slices=slices, all_used=several)


def arrange_slices(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Arrange the devices of several slices, so that only data spans them, if it can.

    Args:
        devices: of all slices.
        sizes: of the mesh axes, which use all devices.

    Returns:
        The devices, [data fsdp tensor]; each slice holds consecutive indices of data, or, where
        the number of slices does not divide data, consecutive devices.
    """
    shape, slices = tuple(sizes.values()), _slice_count(devices)
    if shape[0] % slices:
        ordered = sorted(devices, key=lambda device: (device.slice_index, device.id))
        return np.asarray(ordered, dtype=object).reshape(shape)
    inside, outside = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    try:
        return mesh_utils.create_hybrid_device_mesh(inside, outside, devices)
    except NotImplementedError:  # an axis would have to take a part of a torus's axis
        return mesh_utils.create_hybrid_device_mesh(
            inside, outside, devices, allow_split_physical_axes=True
        )


def _slice_count(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """Make the 1·1·1 mesh of one device, by default the first of this process."""
    return make_mesh(devices=[jax.local_devices()[0] if device is None else device])


def path_string(path: Sequence[Any]) -> str:
    """Join the keys of a pytree path with dots: `layers.3.mlp.up_proj.kernel`."""
    return ".".join(str(getattr(key, "key", key)) for key in path)


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Name the dimensions of one parameter.

    Args:
        path: dotted parameter path, `layers.3.mlp.up_proj.kernel`; without the layer number for
            stacked layers, whose leading layer dimension is never split.
        ndim: number of dimensions of the parameter.

    Returns:
        One logical axis name, or None, per dimension.

    Raises:
        ValueError: no module declares the path, or it has another number of dimensions.
    """
    prefix = _LAYER_PREFIX.match(path)
    axes = declared_axes().get(path[prefix.end() :] if prefix else path)
    if axes is not None and prefix and prefix.group(1) is None:
        axes = (None, *axes)
    if axes is None or len(axes) != ndim:
        expected = "the path of a declared parameter" if axes is None else f"{len(axes)} dimensions"
        raise ValueError(
            f"no sharding is known for parameter {path} with {ndim} dimension(s): expected "
            f"{expected}; parameters and their logical axes are declared by the modules in "
            "ivl_jax/model"
        )
    return axes


def parameter_shardings(
    abstract_params: Mapping[Any, Any],
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    units: Mapping[str, int] = NO_UNITS,
) -> dict[Any, Any]:
    """Decide where each parameter lives.

    Args:
        abstract_params: nested dict of arrays or `ShapeDtypeStruct`s.
        mesh: the device mesh.
        rules: logical axis → mesh axis.
        units: how many indivisible units a logical axis consists of, for example
            `{"heads": 32, "kv_heads": 8}`: a mesh axis must divide the units too, so that no head
            is split.

    Returns:
        The same nested dict with a `NamedSharding` for each leaf. A dimension that its mesh axis
        does not divide is replicated, with one warning for all of them.

    Raises:
        ValueError: no module declares a path.
    """
    notices: dict[str, int] = {}  # what → how many arrays, one per layer

    def one(key_path: Sequence[Any], leaf: Any) -> NamedSharding:
        path = path_string(key_path)
        spec = []
        for dim, (axis, size) in enumerate(
            zip(logical_axes(path, leaf.ndim), leaf.shape, strict=True)
        ):
            mesh_axis = getattr(rules, axis) if axis else None
            ways = mesh.shape[mesh_axis] if mesh_axis else 1
            if axis and (size % ways or units.get(axis, ways) % ways):
                count = f"{units[axis]} {axis} of " if axis in units else ""
                where = re.sub(r"^layers\.\d+\.", "layers.*.", path)
                notice = f"{where} dim {dim} ({count}size {size}) over {mesh_axis}={ways}"
                notices[notice] = notices.get(notice, 0) + 1
                mesh_axis = None
            spec.append(mesh_axis if ways > 1 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(one, dict(abstract_params))
    if notices:
        listed = [f"{what}, {n} times" if n > 1 else what for what, n in notices.items()]
        more = f"; and {len(listed) - 20} more" if len(listed) > 20 else ""
        logger.warning("replicated, as not divisible: %s%s", "; ".join(listed[:20]), more)
    return shardings


def padded_vocab_rows(vocab_size: int, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> int:
    """Round the vocabulary's rows up so that they divide evenly on this and other common meshes.

    Args:
        vocab_size: rows of the model's own weights.
        mesh: the device mesh.
        rules: logical axis → mesh axis.

    Returns:
        The smallest multiple of 64 and of the mesh axis that splits the vocabulary.
    """
    ways = mesh.shape[rules.vocabulary] if rules.vocabulary else 1
    multiple = math.lcm(VOCABULARY_ROW_MULTIPLE, ways)
    return math.ceil(vocab_size / multiple) * multiple


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """The number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, *, micro_batched: bool = False) -> NamedSharding:
    """The sharding of a batch: rows split over data × fsdp, positions not split.

    Args:
        mesh: the device mesh.
        micro_batched: arrays are [A B T], micro-batches first, instead of [B T].

    Returns:
        The sharding for every array of a batch.
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * micro_batched, BATCH_AXES))


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Find which share of each batch this process must read.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same
    share.

    Args:
        mesh: the device mesh.

    Returns:
        (index of this process's share, number of shares).

    Raises:
        ValueError: two processes have some rows in common, but not all.
    """
    rows: dict[int, set[int]] = {}
    ways = batch_ways(mesh)
    for device, index in batch_sharding(mesh).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).update(range(ways)[index[0]])
    shares = sorted({tuple(sorted(own)) for own in rows.values()})
    if sum(len(share) for share in shares) != ways:
        raise ValueError(
            f"mesh {dict(mesh.shape)} splits the rows of a batch unevenly over processes: make "
            "data × fsdp a multiple of the number of processes, or tensor a multiple of the "
            "number of devices per process"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def place_batch(batch: Tree, mesh: Mesh, *, micro_batched: bool = False) -> Tree:
    """Put this process's rows of a batch on its devices as global arrays.

    Args:
        batch: pytree of NumPy arrays [B T] (or [A B T]), B the rows of this process.
        mesh: the device mesh.
        micro_batched: arrays are [A B T].

    Returns:
        The same pytree of global jax arrays, rows split over data × fsdp.
    """
    sharding = batch_sharding(mesh, micro_batched=micro_batched)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def activation_constraint(
    mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> Callable[[Array, tuple[str, ...]], Array]:
    """Make the callable that tells XLA how a model's activations are sharded.

    Without it XLA may follow the fsdp-sharded weights and split the residual stream along D, so
    that every device computes every row.

    Args:
        mesh: the device mesh.
        rules: how the model's parameters are sharded.

    Returns:
        A function from (array, logical name of each dimension) to the constrained array: rows over
        data × fsdp; heads, MLP width and vocabulary like the parameters; D and positions not split.
        A dimension that does not divide (one prompt on many devices, few kv heads) is not split.
    """
    split: dict[str, tuple[str, ...]] = {"batch": BATCH_AXES}
    for name in ("heads", "mlp", "vocabulary"):
        if (axis := getattr(rules, name)) and axis not in BATCH_AXES:
            split[name] = (axis,)

    def constrain(activations: Array, axes: tuple[str, ...]) -> Array:
        spec = []
        for size, name in zip(activations.shape, axes, strict=True):
            mesh_axes = split.get(name, ())
            ways = math.prod(mesh.shape[axis] for axis in mesh_axes)
            spec.append(mesh_axes if ways > 1 and size % ways == 0 else None)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(activations, sharding)

    return constrain


def bytes_per_device(tree: Any) -> dict[int, int]:
    """Count the bytes that a pytree of arrays holds on each device of this process.

    Args:
        tree: pytree of jax arrays.

    Returns:
        Device id → bytes.
    """
    held: dict[int, int] = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held
