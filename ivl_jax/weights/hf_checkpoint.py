"""Loads parameters from a Hugging Face folder: streamed, sharded, strict, in their final form.

In: a folder and an architecture. Out: the nested dict of parameters, with only its own slice on
each device.
"""

import collections
import functools
import logging
import math
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jaxtyping import Array, DTypeLike
from rich.console import Console
from rich.progress import Progress

from ivl_jax.finite_arrays import NonFiniteWeightsError, count_non_finite
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import Params, abstract_params, parameter_declarations
from ivl_jax.model.decode_layout import FUSED
from ivl_jax.model.int8 import quantize
from ivl_jax.model.parameter import ParamPath
from ivl_jax.model.projection import AS_TRAINED, KernelForm
from ivl_jax.tree_compare import mismatch_error, tree_mismatches
from ivl_jax.weights.hf_folder import find_tensors
from ivl_jax.weights.hf_names import (
    EMBEDDING,
    LM_HEAD,
    LOADED_DTYPES,
    file_shapes,
    flat_paths,
    hf_tensors,
    is_derived,
    is_vision,
)
from ivl_jax.weights.safetensors_file import DTYPES, Target, TensorRecord, read_slices, same_bytes

logger = logging.getLogger(__name__)

_READERS = 4  # threads; each holds at most one tensor's slices beyond what is loaded
_SHOW_PROGRESS_FROM = 2_000_000_000  # bytes

Bounds = tuple[tuple[int, int], ...]  # start and stop of a slice along each dimension


class _Source(NamedTuple):
    """Where one parameter comes from and what it becomes."""

    records: tuple[TensorRecord, ...]  # several are stacked along their rows: a fused projection
    transposed: bool
    shape: tuple[int, ...]  # of the parameter, vocabulary padding included
    sharding: Sharding | None

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(record.nbytes for record in self.records)


def load_params(
    folder: Path | str,
    arch: ArchConfig,
    *,
    param_dtype: DTypeLike = jnp.float32,
    form: KernelForm = AS_TRAINED,
    vocab_rows: int | None = None,
    shardings: Mapping[Any, Any] | None = None,
    entries: Collection[str] = (),
) -> Params:
    """Load the parameters of a Hugging Face folder.

    Every process reads the rows that its own devices need, once; on CPU the arrays become the
    parameters without a copy. Rows beyond the vocabulary are zero. With int8 kernels, only a few
    exist as floats at a time.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its shards; float32,
            bfloat16 or float16.
        arch: the architecture, from the folder's `config.json`.
        param_dtype: float32, bfloat16 or float16, of every parameter that is not in int8.
        form: how kernels are stored. The embedding stays a float, so a tied head is not converted
            to int8 here.
        vocab_rows: rows of embedding and head, more than the vocabulary to pad for a mesh; None:
            `arch.vocab_size`.
        shardings: a sharding for each parameter; None: everything on the default device.
        entries: read only these top-level entries, for example `lm_head`; empty: all. The whole
            folder is checked in any case.

    Returns:
        The parameters, layers unstacked, in the paths of `abstract_params(arch, form=form)`.

    Raises:
        FileNotFoundError: the folder has no safetensors files.
        TreeMismatchError: a tensor is unknown, missing, set twice, or has another shape or dtype;
            or a shard is damaged or misplaced. Lists at most 20 of them.
        NonFiniteWeightsError: a tensor has NaN or infinity, or a number too large for float16.
        ValueError: `param_dtype` is not supported, `vocab_rows` is below the vocabulary, or there
            are shardings for the single-device form (`form.rows`).
    """
    folder = Path(folder)
    dtype = jnp.dtype(param_dtype)
    if dtype not in LOADED_DTYPES:
        raise ValueError(f"param_dtype: expected float32, bfloat16 or float16, got {dtype}")
    if vocab_rows is not None and vocab_rows < arch.vocab_size:
        raise ValueError(
            f"vocab_rows: expected at least the vocabulary, {arch.vocab_size}, got {vocab_rows}"
        )
    if form.rows and shardings is not None:
        raise ValueError("kernels (out, in) are for a single device: expected no shardings")
    records = _match(folder, arch)
    target = flat_paths(abstract_params(arch, vocab_rows=vocab_rows, form=form))
    if entries:
        target = {path: leaf for path, leaf in target.items() if path[0] in entries}
    placed = {} if shardings is None else flat_paths(shardings)
    if shardings is not None and set(placed) != set(target):
        raise ValueError(
            f"shardings: expected one for each of {len(target)} parameters, got "
            f"{len(placed)}, {len(set(placed) ^ set(target))} of them in only one of the trees"
        )
    declared = parameter_declarations(arch, form=form)
    sources = {
        path: _Source(
            records=tuple(records[part] for part in _parts(path)),
            transposed=declared[path].transposed,
            shape=leaf.shape,
            sharding=placed.get(path),
        )
        for path, leaf in target.items()
        if declared[path].hf_suffix is not None
    }
    params: dict[ParamPath, Array] = {}
    for path, array in _read_all(sources, dtype, folder.name):
        if declared[path].dtype == jnp.int8:
            # Waits, as reading does: the floats are freed before the next ones are read.
            for name, part in jax.block_until_ready(_rounded(array, rows=form.rows)).items():
                key = (*path[:-1], name)
                params[key] = jax.device_put(part, placed[key]) if placed else part
        else:
            params[path] = array
    return traverse_util.unflatten_dict({path: params[path] for path in target})


def _parts(path: ParamPath) -> list[ParamPath]:
    """The parameters as trained whose rows a parameter of this form contains, in order."""
    *modules, name, leaf = path
    return [(*modules, part, leaf) for part in FUSED.get(str(name), (name,))]


@functools.partial(jax.jit, static_argnames="rows")
def _rounded(kernel: Array, *, rows: bool) -> Params:
    return quantize({"kernel": kernel}, rows=rows)


def _match(folder: Path, arch: ArchConfig) -> dict[ParamPath, TensorRecord]:
    """Parameter → where it is stored, after checking that the tensors match the architecture."""
    found = {name: rec for name, rec in find_tensors(folder).items() if not is_derived(name)}
    vision = [name for name in found if is_vision(name)] if arch.model_type == "gemma3_text" else []
    if vision:
        logger.warning(
            "%s: ignored %d tensors of its image encoder (%s, …): only its text decoder is loaded",
            folder,
            len(vision),
            vision[0],
        )
        found = {name: record for name, record in found.items() if not is_vision(name)}
    problems: list[str] = []
    if arch.tie_word_embeddings and LM_HEAD in found and EMBEDDING in found:
        if not same_bytes(found[LM_HEAD], found[EMBEDDING]):
            problems.append(
                f"{LM_HEAD}: expected the same bits as {EMBEDDING}, since config.json sets "
                "tie_word_embeddings, got others; if the head is separate, set that to false"
            )
        del found[LM_HEAD]
    expected = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in file_shapes(arch).items()
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
            remedy="Check that weights and config.json belong to the same model; a quantised one, "
            "or one with adapters, must first be saved as a plain model. A model without "
            "lm_head.weight needs tie_word_embeddings.",
        )
    return {
        path: found[tensor.name].rows(tensor.start, tensor.shape[0])
        for path, tensor in hf_tensors(arch).items()
    }


def _read_all(
    sources: Mapping[ParamPath, _Source], dtype: np.dtype, name: str
) -> Iterator[tuple[ParamPath, Array]]:
    """Read with a few threads, largest first, so that little is loaded while much is in flight.

    Yields one parameter at a time, in the same order in every process, reading only a few ahead.
    """
    order = sorted(sources, key=lambda path: -sources[path].nbytes)
    total = sum(source.nbytes for source in sources.values())
    console = Console(stderr=True)
    hidden = total < _SHOW_PROGRESS_FROM or not console.is_terminal or jax.process_index() > 0
    with ExitStack() as stack:
        files = {record.file for source in sources.values() for record in source.records}
        descriptors = {}
        for file in files:
            descriptors[file] = os.open(file, os.O_RDONLY)
            stack.callback(os.close, descriptors[file])
        progress = stack.enter_context(Progress(console=console, transient=True, disable=hidden))
        task = progress.add_task(f"loading {name}", total=total)
        pool = stack.enter_context(ThreadPoolExecutor(_READERS, "read-weights"))
        device = jax.config.jax_default_device  # type: ignore[attr-defined] # of the calling thread

        def read(path: ParamPath) -> Array:
            with jax.default_device(device):
                array = _read_one(descriptors, sources[path], dtype)
                if dtype == jnp.float16:
                    _check_overflow(array, path, name)
            progress.advance(task, sources[path].nbytes)
            return array

        in_flight: collections.deque[tuple[ParamPath, Future[Array]]] = collections.deque()
        for path in order:
            in_flight.append((path, pool.submit(read, path)))
            if len(in_flight) > _READERS:
                first, array = in_flight.popleft()
                yield first, array.result()
        yield from ((path, array.result()) for path, array in in_flight)


def _read_one(descriptors: Mapping[Path, int], source: _Source, dtype: np.dtype) -> Array:
    """One parameter, with only its own slice on each of this process's devices."""
    if source.sharding is None:
        whole = tuple((0, size) for size in source.shape)
        return _convert(jax.device_put(_read_parts(descriptors, source, [whole])[whole]), dtype)
    places: dict[jax.Device, Bounds] = {}
    for device, index in source.sharding.addressable_devices_indices_map(source.shape).items():
        assert index is not None  # every device of a NamedSharding holds a part
        places[device] = tuple(
            cut.indices(size)[:2] for cut, size in zip(index, source.shape, strict=True)
        )
    parts = _read_parts(descriptors, source, set(places.values()))
    shards = [
        _convert(jax.device_put(parts[bounds], device), dtype) for device, bounds in places.items()
    ]
    return jax.make_array_from_single_device_arrays(source.shape, source.sharding, shards)


def _convert(array: Array, dtype: np.dtype) -> Array:
    """Convert to a dtype; waits, so that only a few tensors are on the host at a time."""
    return jax.block_until_ready(jax.lax.convert_element_type(array, dtype))


def _check_overflow(array: Array, path: ParamPath, name: str) -> None:
    """Refuse numbers that became infinite; those of the file are finite."""
    # Counted on the devices: the host would have to copy the array, which is not there any more.
    shards = [shard.data for shard in array.addressable_shards]
    if count := sum(int(jnp.sum(~jnp.isfinite(data), dtype=jnp.int32)) for data in shards):
        raise NonFiniteWeightsError(
            f"{name} cannot be held in float16, which ends at 65,504: "
            f"{'.'.join(map(str, path))} has {count} larger numbers; use bfloat16 or float32"
        )


def _read_parts(
    descriptors: Mapping[Path, int], source: _Source, parts: Iterable[Bounds]
) -> dict[Bounds, np.ndarray]:
    """Slices of a parameter in the file's dtype; the file's rows are read once for all slices."""
    record, *more = source.records
    if more:
        return {whole: _read_stacked(descriptors, source.records) for whole in parts}
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
    read_slices(descriptors[record.file], record, targets)
    for buffer in buffers.values():
        _check_finite(buffer, record)
    return buffers


def _read_stacked(descriptors: Mapping[Path, int], records: tuple[TensorRecord, ...]) -> np.ndarray:
    """Whole tensors stacked along their rows, in the widest of their dtypes."""
    height, width = sum(record.shape[0] for record in records), records[0].shape[1:]
    dtype = functools.reduce(np.promote_types, (DTYPES[record.dtype] for record in records))
    stacked, start = _new_pages((height, *width), dtype), 0
    for record in records:
        rows = stacked[start : start + record.shape[0]]
        alone = (
            rows if dtype == DTYPES[record.dtype] else np.empty(rows.shape, DTYPES[record.dtype])
        )
        columns = slice(0, math.prod(width))
        read_slices(
            descriptors[record.file], record, [Target(alone, slice(0, record.shape[0]), columns)]
        )
        _check_finite(alone, record)
        if alone is not rows:
            rows[:] = alone
        start += record.shape[0]
    return stacked


def _check_finite(array: np.ndarray, record: TensorRecord) -> None:
    """Refuse NaN and infinity: every token would come out of them as garbage."""
    if count := count_non_finite(array):
        raise NonFiniteWeightsError(
            f"{record.file}: {record.name}: expected finite numbers, found {count} that are NaN or "
            "infinite: the file is damaged, or the model diverged in training; copy it again, or "
            "take an earlier checkpoint"
        )


def _new_pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in its own pages, which JAX on CPU takes over without a copy (64-byte alignment).

    Not `np.empty`: it requests huge pages, and a virtual machine that returns free ones to its host
    gets them at 0.5 GB/s, ordinary ones at 2.5 GB/s (loading took twice as long).
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, count=size).view(dtype).reshape(shape)
