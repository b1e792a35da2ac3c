"""Disk space and memory that a run needs, checked before it allocates any.

In: the config, the trained model, the run directory, the mesh. Out: a line for the user, or an
error for what cannot fit.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ivl_jax.config import ConfigError, LayoutName, LoggingConfig, TrainConfig
from ivl_jax.devices import device_memory, host_memory
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import Architecture
from ivl_jax.paths import is_local
from ivl_jax.sharding import LAYOUTS
from ivl_jax.training.step import TrainState

logger = logging.getLogger(__name__)

# Per position of a batch: token, target, position and segment in int32, and the loss mask.
_BATCH_BYTES = 17
_BYTES_TRAINED = 16  # a trained parameter: weight, gradient and two moments in float32


class DiskUse(NamedTuple):
    """What a run writes, in bytes, uncompressed: trained float32 arrays hardly compress."""

    first: int  # the checkpoint of step 0, which has no optimizer state
    checkpoint: int  # each later one
    output: int  # the value folder, or the fine-tuned model's
    saving: int  # the newest checkpoints while one more is being written
    kept: int  # the newest checkpoints when the run has ended
    best: int  # the best checkpoint if it is not one of the newest

    @property
    def most(self) -> int:
        """The maximum at any moment."""
        return self.best + max(self.saving, self.kept + self.output)


def disk_use(logging_config: LoggingConfig, state: TrainState, *, total_steps: int) -> DiskUse:
    """Compute how many bytes a run's checkpoints and output take.

    Args:
        logging_config: how often it saves and how many checkpoints it keeps.
        state: its train state, or its shapes.
        total_steps: steps of the whole run.

    Returns:
        Bytes. Records and TensorBoard events are small and not counted.
    """
    params, whole = _bytes(state.params), _bytes(state)
    first = whole - _bytes(state.opt_state)
    saves = math.ceil(total_steps / logging_config.checkpoint_every)
    keep = logging_config.keep_checkpoints

    def newest(count: int) -> int:
        return whole * min(count, saves) + (first if count > saves else 0)

    best = whole if saves + 1 > keep else 0
    return DiskUse(first, whole, params, newest(keep + 1), newest(keep), best)


def check_disk(use: DiskUse, run_dir: epath.Path) -> None:
    """Log what a run will write, and raise if the disk cannot hold it.

    Args:
        use: from `disk_use`.
        run_dir: the run directory, which exists; the limit of an object store is not known.

    Raises:
        OSError: there is not enough space; the message says how much is missing.
    """
    if jax.process_index() > 0:
        return
    free = shutil.disk_usage(run_dir).free if is_local(run_dir) else None
    logger.info(
        "%s: a checkpoint takes %s (step 0, without optimizer state, %s), the final parameters %s, "
        "everything at once at most %s%s",
        run_dir,
        _size(use.checkpoint),
        _size(use.first),
        _size(use.output),
        _size(use.most),
        "" if free is None else f"; {_size(free)} free",
    )
    if free is None:
        return
    written = sum(path.stat().st_size for path in Path(run_dir).rglob("*") if path.is_file())
    missing = use.most - written - free
    if missing <= 0:
        return
    message = (
        f"{run_dir}: the disk is {_size(missing)} short of what this run may write: free some "
        "space, choose a run_dir on another disk, or lower logging.keep_checkpoints"
    )
    # The best checkpoint may be one of the newest.
    if missing > use.best:
        raise OSError(message)
    logger.warning(message)


def check_batch(config: TrainConfig, arch: Architecture, mesh: Mesh) -> None:
    """Refuse a batch that does not fit this machine's memory, before anything is allocated.

    Counts only what is certain: the batch's integers, and the layers' inputs, which the gradient
    needs even with recomputation. A batch that passes may still be too large.

    Args:
        config: of the run.
        arch: of the trained model.
        mesh: the device mesh.

    Raises:
        ConfigError: it cannot fit; the message says what it takes and what is available.
    """
    rows, length = config.step.batch_size, config.data.max_length
    batch = rows * length * _BATCH_BYTES
    host = host_memory()
    if host is not None and batch // jax.process_count() > host:
        raise ConfigError(
            f"step.batch_size = {rows:,}: a batch of {rows:,} rows of {length:,} tokens takes "
            f"{_size(batch)} of memory before any computation, but this machine has only "
            f"{_size(host)}: lower step.batch_size"
        )
    width = getattr(arch, "hidden_size", 0) * arch.num_hidden_layers
    itemsize = jnp.dtype(config.step.compute_dtype).itemsize
    per_row = length * width * itemsize
    needed = (rows // config.step.micro_batches * per_row + batch) // mesh.devices.size
    available = device_memory(mesh)
    if available is not None and needed > available:
        raise ConfigError(
            f"step.batch_size = {rows:,} in step.micro_batches = {config.step.micro_batches:,}: a "
            f"gradient takes at least {_size(needed)} of each device's memory (the batch, and "
            f"every layer's input for the rows of one micro-batch, {_size(per_row)} per row), but "
            f"a device has {_size(available)}: raise step.micro_batches or lower step.batch_size"
        )


def _bytes(tree: Any) -> int:
    """Bytes of the arrays (or `ShapeDtypeStruct`s) of a tree; a typed key counts as its data."""
    sizes = [leaf.size * getattr(leaf.dtype, "itemsize", 8) for leaf in jax.tree.leaves(tree)]
    return sum(sizes)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def check_linear_map(
    arch: LinearMapConfig, layout: LayoutName, mesh: Mesh, memory: int | None = None
) -> None:
    """Check that a linear map on base logits can be trained in a device's memory.

    Args:
        arch: the map.
        layout: which mesh axes split it.
        mesh: the device mesh.
        memory: bytes per device, of devices that are not attached; None: they are asked.

    Raises:
        ConfigError: it does not fit; names the rank that would.
    """
    rules, size = LAYOUTS[layout], arch.vocab_size
    ways = math.prod(mesh.shape[axis] for axis in (rules.embed, rules.vocabulary) if axis)
    parameters = 2 * size * arch.rank if arch.rank else size * size
    needed = parameters * _BYTES_TRAINED // ways
    formula = f"2 · V · rank = 2 · {size:,} · {arch.rank}" if arch.rank else f"V² = {size:,}²"
    logger.info("linear map on base logits: %s = %s parameters", formula, f"{parameters:,}")
    available = device_memory(mesh) if memory is None else memory
    if available is not None and needed > available:
        rank = min(256, size // 2)
        raise ConfigError(
            f"value.rank = {arch.rank}: training a linear map of {formula} parameters takes "
            f"{needed / 1e9:,.0f} GB per device (weights, gradient, two moments in float32), but a "
            f"device has {available / 1e9:,.0f} GB: set value.rank; {rank} takes "
            f"{2 * size * rank * _BYTES_TRAINED / ways / 1e9:,.1f} GB"
        )


def check_depths(arch: Architecture, depths: int) -> None:
    """Check that a value network has the layers that its head is to read.

    Args:
        arch: of the value network.
        depths: `value.depths`.

    Raises:
        ConfigError: it has fewer.
    """
    if depths > arch.num_hidden_layers:
        raise ConfigError(
            f"value.depths = {depths}: the value network has {arch.num_hidden_layers} layers, of "
            "which its head reads the last ones; expected at most that many"
        )


def check_context(config: TrainConfig, contexts: Mapping[str, int]) -> None:
    """Check that models can read rows of `data.max_length` tokens.

    Args:
        config: of the run.
        contexts: each model's name and its context, in tokens.

    Raises:
        ConfigError: a shorter context, which `data.beyond_context` does not allow.
    """
    long = [
        f"{name}: {context}"
        for name, context in contexts.items()
        if config.data.max_length > context
    ]
    if not long:
        return
    message = f"data.max_length = {config.data.max_length} exceeds the context of {', '.join(long)}"
    if not config.data.beyond_context:
        raise ConfigError(f"{message}: lower it, or set data.beyond_context = true")
    logger.warning("%s; data.beyond_context allows it", message)
