"""How much a training step computes and moves on each device, by arithmetic.

In: a config, its models and a mesh. Out: FLOPs and bytes. The compiler's own estimate is of no use
here: it counts the body of a loop once.

FLOPs per token and matrix parameter: 2 in the forward pass, 4 in the backward pass (2 if it is
frozen), 2 more where layers are recomputed; attention reads T / 2 keys on average, and at most the
window of a sliding layer.

Memory traffic: each matrix product reads both operands and writes its result once; there is one
per matrix in the forward pass, and two more in the backward pass (one if it is frozen; adapters
are left out). The optimizer reads and writes
parameters and moments, and reads the gradient that every micro-batch adds to. Norms, activations
and attention, which compilers fuse into their neighbours, are left out: it is a lower bound.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.config import TrainConfig
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.lora import adapter_shapes
from ivl_jax.model.network import Architecture
from ivl_jax.model.projection import Lora
from ivl_jax.sharding import batch_ways
from ivl_jax.training.models import FrozenBase, Models, float_dtype
from ivl_jax.training.objectives import find_objective

_FLOAT32 = 4  # bytes; logits, gradients and master weights


class _Matrix(NamedTuple):
    """A matrix that every token is multiplied with."""

    rows: int
    columns: int
    count: int
    result_width: int  # bytes per number of its result; 0: the compute dtype's


def step_flops(config: TrainConfig, models: Models, base: FrozenBase | None) -> float:
    """The multiplications and additions of one step, over all devices.

    Args:
        config: of the run.
        models: of the run.
        base: runs forward only, and not at all where its states are cached; None: no base.

    Returns:
        FLOPs.
    """
    length = config.data.max_length
    tokens = config.step.batch_size * length
    layers, head = _forward_flops(models.arch, length)
    total = (4 if recomputes(config) else 3) * layers + 3 * head
    passes = heads_passes(config)
    total += (passes - 1) * head
    if models.lora is not None:
        # The gradients of the frozen matrices are not computed, those of the adapter's two are.
        for matrix in _matrices(models.arch):
            total -= 2.0 * matrix.rows * matrix.columns * matrix.count
        total += 6.0 * _adapter_size(models.arch, models.lora)
    if base is not None:
        layers, head = _forward_flops(base.model.arch, length)
        total += passes * head + (0 if base.config.cache_states else layers)
    for arch in compared_with(models):
        layers, head = _forward_flops(arch, length)
        total += passes * head + layers
    return float(total) * tokens


def step_traffic(
    config: TrainConfig,
    models: Models,
    base: FrozenBase | None,
    mesh: Mesh,
    *,
    trained: int,
    optimizer: int,
) -> float:
    """The bytes that one step reads from and writes to the memory of each device.

    Args:
        config: of the run.
        models: of the run.
        base: as in `step_flops`.
        mesh: rows are split over data and fsdp, matrices over tensor.
        trained: bytes of the trained parameters on each device.
        optimizer: bytes of the optimizer's state on each device.

    Returns:
        Bytes per device.
    """
    micro_batches = config.step.micro_batches
    width = jnp.dtype(config.step.compute_dtype).itemsize
    tokens = config.step.batch_size // micro_batches // batch_ways(mesh) * config.data.max_length

    def products(arch: Architecture, layers: int, head: int, weight_width: int) -> float:
        """Bytes of all products in a micro-batch, each done this often in layers and head."""
        total = 0.0
        for matrix in _matrices(arch):
            numbers = matrix.rows * matrix.columns * weight_width
            read, written = matrix.rows * width, matrix.columns * (matrix.result_width or width)
            times = head if matrix.result_width else layers
            total += times * matrix.count * (numbers + tokens * (read + written))
        return total / mesh.shape["tensor"]

    # Master weights are converted, and gathered over fsdp, in the compute dtype.
    backward = 2 if models.lora is None else 1
    layers = backward + (2 if recomputes(config) else 1)
    head = backward + heads_passes(config)
    total = micro_batches * products(models.arch, layers, head, width)
    if base is not None:
        stored = (
            1 if base.config.param_dtype == "int8" else jnp.dtype(float_dtype(base.config)).itemsize
        )
        layers = 0 if base.config.cache_states else 1
        total += micro_batches * products(base.model.arch, layers, heads_passes(config), stored)
    for arch in compared_with(models):
        stored = jnp.dtype(config.distil.param_dtype).itemsize
        total += micro_batches * products(arch, 1, heads_passes(config), stored)
    gradients = 2 * micro_batches * trained  # added up, then read by the optimizer
    return total + gradients + 2 * (trained + optimizer)


def heads_passes(config: TrainConfig) -> int:
    """How often the heads run forward: twice if the objective's weights depend on the model."""
    return 2 if find_objective(config).first_pass else 1


def compared_with(models: Models) -> list[Architecture]:
    """The networks that run forward beside student and base: the teacher's, or the original."""
    if models.teacher is not None:
        return [source.arch for source in (models.teacher.base, *models.teacher.values)]
    return [] if models.original is None else [models.original.model.arch]


def recomputes(config: TrainConfig) -> bool:
    """Whether the backward pass runs the layers' whole forward pass once more."""
    return config.step.remat == "full"


def _adapter_size(arch: Architecture, lora: Lora) -> int:
    assert isinstance(arch, ArchConfig)
    return sum(leaf.size for leaf in jax.tree.leaves(adapter_shapes(arch, lora)))


def _matrices(arch: Architecture) -> Iterator[_Matrix]:
    """Those of the layers, then the head."""
    if isinstance(arch, LinearMapConfig):
        size, rank = arch.vocab_size, arch.rank
        if rank:
            yield _Matrix(size, rank, 1, _FLOAT32)
        yield _Matrix(rank or size, size, 1, _FLOAT32)
        return
    width, count = arch.hidden_size, arch.num_hidden_layers
    queries, keys = (
        heads * arch.head_dim for heads in (arch.num_attention_heads, arch.num_key_value_heads)
    )
    yield _Matrix(width, queries, count, 0)
    yield _Matrix(width, keys, 2 * count, 0)
    yield _Matrix(queries, width, count, 0)
    yield _Matrix(width, arch.intermediate_size, 2 * count, 0)
    yield _Matrix(arch.intermediate_size, width, count, 0)
    yield _Matrix(width, arch.vocab_size, 1, _FLOAT32)


def _mean_keys(length: int, window: int) -> float:
    """Keys that a query of a row sees on average, within a window."""
    window = min(window, length)
    return window - window * window / (2 * length)


def _forward_flops(arch: Architecture, length: int) -> tuple[float, float]:
    """Per token of the forward pass: (layers, head)."""
    layers = head = 0.0
    for matrix in _matrices(arch):
        flops = 2.0 * matrix.rows * matrix.columns * matrix.count
        if matrix.result_width:
            head += flops
        else:
            layers += flops
    if not isinstance(arch, LinearMapConfig):
        # Scores and their product with the values: two products per key.
        width = arch.num_attention_heads * arch.head_dim
        window = arch.sliding_window or length
        for kind in arch.layer_types:
            layers += (
                2
                * 2.0
                * width
                * _mean_keys(length, window if kind == "sliding_attention" else length)
            )
    return layers, head
