"""Parameters from a Hugging Face folder and back: streamed, sharded, strict both ways.

In: a folder and an architecture. Out: the nested dict of parameters, each device holding only its
slice; or a folder that transformers loads.
"""

import collections
import functools
import json
import logging
import math
import mmap
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array, DTypeLike
from rich.console import Console
from rich.progress import Progress

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, abstract_params
from ivl_jax.tree_compare import check_same_tree, mismatch_error, named_leaves, tree_mismatches
from ivl_jax.weights.hf_folder import INDEX_FILE, SINGLE_FILE, find_tensors, new_folder
from ivl_jax.weights.hf_names import EMBEDDING, LM_HEAD, HfTensor, hf_tensor, is_derived, is_vision
from ivl_jax.weights.safetensors_file import (
    DTYPES,
    Target,
    TensorRecord,
    read_slices,
    same_bytes,
    write_file,
)

logger = logging.getLogger(__name__)

_PARAM_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
_READERS = 4  # threads; each holds at most one tensor's slices beyond what is loaded
_SHOW_PROGRESS_FROM = 2_000_000_000  # bytes

ParamPath = tuple[str | int, ...]
Bounds = tuple[tuple[int, int], ...]  # start and stop of a slice along each dimension


def _flat(tree: Mapping[Any, Any]) -> dict[ParamPath, Any]:
    return traverse_util.flatten_dict(dict(tree))  # type: ignore[return-value]


class _Source(NamedTuple):
    """Where one parameter comes from and what it becomes."""

    record: TensorRecord
    transposed: bool
    shape: tuple[int, ...]  # of the parameter, vocabulary padding included
    sharding: Sharding | None


def load_params(
    folder: Path | str,
    arch: ArchConfig,
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    shardings: Mapping[Any, Any] | None = None,
    entries: Collection[str] = (),
) -> Params:
    """Load the parameters of a Hugging Face folder.

    Every process reads the rows its own devices need, once; on CPU the arrays read become the
    parameters without a copy. Rows beyond the vocabulary are zero.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its shards; float32,
            bfloat16 or float16.
        arch: the architecture, from the folder's `config.json`.
        param_dtype: float32 or bfloat16, of every parameter.
        vocab_rows: rows of embedding and head; None: `arch.vocab_size`. More pads for a mesh.
        shardings: a sharding for each parameter; None: everything on the default device.
        entries: read only these top-level entries, for example `lm_head`; empty: all. The folder is
            checked as a whole.

    Returns:
        The parameters, layers unstacked, in the paths of `abstract_params(arch)`.

    Raises:
        FileNotFoundError: the folder has no safetensors files.
        TreeMismatchError: a tensor is unknown, missing, set twice, or has another shape or dtype;
            or a shard is damaged or misplaced. All of them are listed, at most 20.
        ValueError: `param_dtype` is not supported, or `vocab_rows` is below the vocabulary.
    """
    folder = Path(folder)
    dtype = jnp.dtype(param_dtype)
    if dtype not in _PARAM_DTYPES:
        raise ValueError(f"param_dtype: expected float32 or bfloat16, got {dtype}")
    if vocab_rows is not None and vocab_rows < arch.vocab_size:
        raise ValueError(
            f"vocab_rows: expected at least the vocabulary, {arch.vocab_size}, got {vocab_rows}"
        )
    target = _flat(abstract_params(arch, vocab_rows=vocab_rows))
    records = _match(folder, arch, target)
    if entries:
        target = {path: leaf for path, leaf in target.items() if path[0] in entries}
    placed = {} if shardings is None else _flat(shardings)
    if shardings is not None and set(placed) != set(target):
        raise ValueError(
            f"shardings: expected one for each of {len(target)} parameters, got "
            f"{len(placed)}, {len(set(placed) ^ set(target))} of them in only one of the trees"
        )
    sources = {
        path: _Source(
            record=records[hf_tensor(path).name],
            transposed=hf_tensor(path).transposed,
            shape=leaf.shape,
            sharding=placed.get(path),
        )
        for path, leaf in target.items()
    }
    return traverse_util.unflatten_dict(_read_all(sources, dtype, folder.name))


def _match(
    folder: Path, arch: ArchConfig, target: Mapping[ParamPath, Any]
) -> dict[str, TensorRecord]:
    """Tensor name → record, once the tensors are found to be just what the architecture needs."""
    found = {name: rec for name, rec in find_tensors(folder).items() if not is_derived(name)}
    vision = [name for name in found if is_vision(name)] if arch.model_type == "gemma3_text" else []
    if vision:
        logger.warning(
            "%s: left out %d tensors of its image encoder (%s, …): only its text decoder is loaded",
            folder,
            len(vision),
            vision[0],
        )
        found = {name: record for name, record in found.items() if not is_vision(name)}
    problems: list[str] = []
    if arch.tie_word_embeddings and LM_HEAD in found and EMBEDDING in found:
        if not same_bytes(found[LM_HEAD], found[EMBEDDING]):
            problems.append(
                f"{LM_HEAD}: expected the same bits as {EMBEDDING}, since config.json says "
                "tie_word_embeddings, got others; if the head is its own, set that to false"
            )
        del found[LM_HEAD]
    expected = {
        (tensor := hf_tensor(path)).name: jax.ShapeDtypeStruct(
            _shape_in_file(tensor, leaf.shape, arch), leaf.dtype
        )
        for path, leaf in target.items()
    }
    problems += tree_mismatches(expected, found, with_dtype=False)
    problems += [
        f"{name}: expected one of {', '.join(DTYPES)}, got {record.dtype}"
        for name, record in found.items()
        if name in expected and record.dtype not in DTYPES
    ]
    if problems:
        raise mismatch_error(
            problems,
            what=f"{folder}: the checkpoint against its config.json ({arch.model_type})",
            remedy="Check that weights and config.json are of the same model; a quantised one, or "
            "one with adapters, must be saved plainly first. A model without lm_head.weight has "
            "tie_word_embeddings set.",
        )
    return found


def _read_all(
    sources: Mapping[ParamPath, _Source], dtype: np.dtype, name: str
) -> dict[ParamPath, Array]:
    """Reads with a few threads, largest first: little is loaded while much is in flight."""
    order = sorted(sources, key=lambda path: -sources[path].record.nbytes)
    total = sum(source.record.nbytes for source in sources.values())
    console = Console(stderr=True)
    hidden = total < _SHOW_PROGRESS_FROM or not console.is_terminal or jax.process_index() > 0
    with ExitStack() as stack:
        files = {source.record.file for source in sources.values()}
        descriptors = {}
        for file in files:
            descriptors[file] = os.open(file, os.O_RDONLY)
            stack.callback(os.close, descriptors[file])
        progress = stack.enter_context(Progress(console=console, transient=True, disable=hidden))
        task = progress.add_task(f"loading {name}", total=total)
        pool = stack.enter_context(ThreadPoolExecutor(_READERS, "read-weights"))
        device = jax.config.jax_default_device  # type: ignore[attr-defined] # of the calling thread

        def read(path: ParamPath) -> Array:
            source = sources[path]
            with jax.default_device(device):
                array = _read_one(descriptors[source.record.file], source, dtype)
            progress.advance(task, source.record.nbytes)
            return array

        arrays = dict(zip(order, pool.map(read, order), strict=True))
    return {path: arrays[path] for path in sources}


def _read_one(descriptor: int, source: _Source, dtype: np.dtype) -> Array:
    """One parameter, each of this process's devices holding its slice only."""
    if source.sharding is None:
        whole = tuple((0, size) for size in source.shape)
        return _convert(jax.device_put(_read_parts(descriptor, source, [whole])[whole]), dtype)
    places: dict[jax.Device, Bounds] = {}
    for device, index in source.sharding.addressable_devices_indices_map(source.shape).items():
        assert index is not None  # every device of a NamedSharding holds a part
        places[device] = tuple(
            cut.indices(size)[:2] for cut, size in zip(index, source.shape, strict=True)
        )
    parts = _read_parts(descriptor, source, set(places.values()))
    shards = [
        _convert(jax.device_put(parts[bounds], device), dtype) for device, bounds in places.items()
    ]
    return jax.make_array_from_single_device_arrays(source.shape, source.sharding, shards)


def _convert(array: Array, dtype: np.dtype) -> Array:
    """In another dtype if need be; waits, so that few tensors are on the host at a time."""
    return jax.block_until_ready(jax.lax.convert_element_type(array, dtype))


def _read_parts(
    descriptor: int, source: _Source, parts: Iterable[Bounds]
) -> dict[Bounds, np.ndarray]:
    """Slices of a parameter, in the file's dtype; the file's rows are read once for all of them."""
    record = source.record
    buffers: dict[Bounds, np.ndarray] = {}
    targets = []
    for part in parts:
        shape = tuple(stop - start for start, stop in part)
        buffers[part] = _new_pages(shape, DTYPES[record.dtype])
        in_file = buffers[part].T if source.transposed else buffers[part]
        (start, stop), *columns = part[::-1] if source.transposed else part
        known = max(0, min(stop, record.shape[0]) - start)
        in_file[known:] = 0  # vocabulary rows beyond the file's
        targets.append(
            Target(
                array=in_file[:known],
                rows=slice(start, start + known),
                columns=slice(*columns[0]) if columns else slice(0, 1),
            )
        )
    read_slices(descriptor, record, targets)
    return buffers


def _new_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in pages of its own, which JAX on CPU takes over without a copy (64 bytes align).

    Not `np.empty`: it asks for huge pages, and a virtual machine that gives its free ones back to
    the host gets them at 0.5 GB/s, ordinary ones at 2.5 GB/s (loading took twice the time).
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, count=size).view(dtype).reshape(shape)


def save_params(
    folder: Path | str,
    arch: ArchConfig,
    params: Params,
    *,
    dtype: DTypeLike,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write parameters and `config.json` as a folder that transformers loads.

    The folder appears when it is complete. Rows beyond the vocabulary are left out.

    Args:
        folder: the folder to make.
        arch: the architecture.
        params: its parameters, layers unstacked, on any devices.
        dtype: float32 or bfloat16, of every tensor written.
        shard_bytes: larger models are split into files of at most this many bytes (or one tensor).
        overwrite: replace a model folder of that name.

    Raises:
        FileExistsError: the folder exists and holds files, and may not be replaced.
        TreeMismatchError: the parameters are not those of the architecture.
        ValueError: `dtype` is not supported.
    """
    with new_folder(Path(folder), overwrite=overwrite) as staging:
        write_params(staging, arch, params, dtype=dtype, shard_bytes=shard_bytes)


def write_params(
    folder: Path,
    arch: ArchConfig,
    params: Params,
    *,
    dtype: DTypeLike,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write what `save_params` writes into a folder that exists; every process must call it."""
    dtype = jnp.dtype(dtype)
    if dtype not in _PARAM_DTYPES:
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype}")
    rows = params["embed_tokens"]["embedding"].shape[0]
    check_same_tree(
        named_leaves(abstract_params(arch, vocab_rows=max(rows, arch.vocab_size))),
        named_leaves(params),
        what=f"parameters to be saved as {arch.model_type}",
        remedy="Save unstacked layers (unstack_layers) with the architecture they belong to; one "
        "whose head was untied has tie_word_embeddings=False.",
        with_dtype=False,
    )
    sinks = [
        _Sink(tensor := hf_tensor(path), leaf, _shape_in_file(tensor, leaf.shape, arch))
        for path, leaf in _flat(params).items()
    ]
    shards = _split(sinks, dtype.itemsize, shard_bytes)
    for file, group in shards.items():
        shapes = {sink.tensor.name: sink.shape for sink in group}
        arrays = (_array_in_file(sink, dtype) for sink in group)
        if jax.process_index() == 0:
            write_file(folder / file, shapes, arrays, dtype=dtype)
        else:
            collections.deque(arrays, maxlen=0)  # gathering takes every process
    if jax.process_index() > 0:
        return
    if len(shards) > 1:
        total = sum(dtype.itemsize * math.prod(sink.shape) for sink in sinks)
        file_of = {sink.tensor.name: file for file, group in shards.items() for sink in group}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": file_of})
    _write_json(folder / "config.json", arch.to_hf() | {"dtype": str(dtype)})


class _Sink(NamedTuple):
    """What one parameter becomes in a file."""

    tensor: HfTensor
    leaf: Array
    shape: tuple[int, ...]  # in the file, without vocabulary padding


def _shape_in_file(
    tensor: HfTensor, param_shape: tuple[int, ...], arch: ArchConfig
) -> tuple[int, ...]:
    shape = param_shape[::-1] if tensor.transposed else param_shape
    return (arch.vocab_size, *shape[1:]) if tensor.name in (EMBEDDING, LM_HEAD) else shape


def _split(sinks: list[_Sink], item_bytes: int, shard_bytes: int) -> dict[str, list[_Sink]]:
    """File name → what goes into it, in order."""
    groups: list[list[_Sink]] = [[]]
    used = 0
    for sink in sinks:
        size = item_bytes * math.prod(sink.shape)
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(sink)
        used += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _array_in_file(sink: _Sink, dtype: np.dtype) -> np.ndarray:
    """The whole tensor on the host; every process must call it."""
    array = _oriented(sink.leaf, transposed=sink.tensor.transposed, dtype=dtype)
    if array.is_fully_addressable:
        whole = np.asarray(array)
    else:
        whole = multihost_utils.process_allgather(array, tiled=True)
    return whole[: sink.shape[0]]


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _oriented(leaf: Array, *, transposed: bool, dtype: np.dtype) -> Array:
    """As the file has it; a copy, because an array keeps the host copy that is made of it."""
    return jnp.copy((leaf.T if transposed else leaf).astype(dtype))
