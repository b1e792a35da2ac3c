"""The safetensors format: headers fully checked, tensors read in slices, files streamed out.

In: a path. Out: where each tensor is stored, its slices in given arrays, or a new file. Files are
read, never mapped: mapped pages count as the process's memory, read ones stay in the page cache.
Writing holds one tensor at a time (the safetensors package needs all of them at once).
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from ivl_jax.json_files import json_kind, parse_json
from ivl_jax.text_files import MalformedFileError

# Dtypes that parameters may be read from. How to convert quantised or 64-bit checkpoints is for the
# user to decide.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own readers
_LARGEST_NUMBER = 2**63 - 1  # of a dimension or an offset; products of a few stay fast
_MOST_DIMENSIONS = 16
_BLOCK_BYTES = 1 << 21  # transposed at once, so that it stays in the second-level cache


class TensorRecord(NamedTuple):
    """Where one tensor is stored."""

    file: Path
    name: str
    dtype: str  # the format's code: F32, BF16, …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    def rows(self, start: int, count: int) -> "TensorRecord":
        """Some of its rows, as a separate tensor."""
        row_bytes = self.nbytes // self.shape[0]
        return self._replace(
            shape=(count, *self.shape[1:]),
            offset=self.offset + start * row_bytes,
            nbytes=count * row_bytes,
        )


class Target(NamedTuple):
    """One slice of a tensor and the array that receives it."""

    array: np.ndarray  # [rows, columns] or [rows], in the file's dtype, any strides
    rows: slice  # of the tensor, start and stop given
    columns: slice  # of the tensor; ignored for vectors


def read_header(path: Path) -> dict[str, TensorRecord]:
    """List the tensors of a file.

    Args:
        path: a `.safetensors` file.

    Returns:
        Tensor name → record, in the order of the header.

    Raises:
        ValueError: the file is truncated or is not a safetensors file, its header violates the
            format, or its tensors overlap or leave gaps; names the file and the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(
                f"{path.name}: expected tensors, got a Git LFS pointer: run `git lfs pull`"
            )
        if len(start) < 8:
            raise ValueError(f"{path.name}: truncated: expected at least 8 bytes, got {size}")
        (length,) = struct.unpack("<Q", start)
        if length > _LONGEST_HEADER:
            raise ValueError(
                f"{path.name}: not a safetensors file: it claims a header of {length} bytes"
            )
        if 8 + length > size:
            raise ValueError(
                f"{path.name}: truncated: expected a header of {length} bytes, got {size - 8}"
            )
        text = file.read(length)
    data_start = 8 + length
    try:
        header = parse_json(text, path.name)
        if not isinstance(header, dict):
            raise ValueError(f"expected an object as the header, got {json_kind(header)}")
        header.pop("__metadata__", None)
        records = {name: _record(path, name, entry, data_start) for name, entry in header.items()}
        _check_layout(records.values(), data_start=data_start, file_bytes=size)
    except MalformedFileError:  # already names the file
        raise
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return records


def _record(path: Path, name: str, entry: Any, data_start: int) -> TensorRecord:
    """A header's entry for one tensor, with every value checked."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected an object, got {json_kind(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError(f"{name}: dtype: expected a name, got {json_kind(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(
            f"{name}: shape: expected at most {_MOST_DIMENSIONS} numbers of elements, got "
            f"{_shown(shape)}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{name}: data_offsets: expected a first and a last byte, got {_shown(offsets)}"
        )
    start, end = offsets
    return TensorRecord(
        file=path,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        offset=data_start + start,
        nbytes=end - start,
    )


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a header value is a list of non-negative integers."""
    return isinstance(value, list) and all(
        type(one) is int and 0 <= one <= _LARGEST_NUMBER for one in value
    )


def _shown(value: Any) -> str:
    """A header value as shown in an error, shortened if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _check_layout(records: Iterable[TensorRecord], *, data_start: int, file_bytes: int) -> None:
    """Check that tensors are contiguous, as long as their shapes require, and fill the file."""
    end = data_start
    for record in sorted(records, key=lambda record: (record.offset, record.nbytes)):
        if record.offset != end:
            raise ValueError(
                f"{record.name}: expected its bytes to start at {end}, got {record.offset}: "
                "tensors overlap or leave a gap"
            )
        item = _ITEM_BYTES.get(record.dtype)
        expected = record.nbytes if item is None else item * math.prod(record.shape)
        if record.nbytes != expected:
            raise ValueError(
                f"{record.name}: expected {expected} bytes for {record.dtype}{list(record.shape)}, "
                f"got {record.nbytes}"
            )
        end += record.nbytes
    if end != file_bytes:
        state = "truncated" if file_bytes < end else "bytes after the last tensor"
        raise ValueError(f"{state}: expected {end} bytes, got {file_bytes}")


def read_slices(descriptor: int, record: TensorRecord, targets: Sequence[Target]) -> None:
    """Fill arrays with slices of one tensor, reading each row of the file once.

    Safe to call from several threads with one descriptor. Needs at most 2 MB (or one row) besides
    the targets.

    Args:
        descriptor: of the opened file.
        record: the tensor, of one or two dimensions.
        targets: the slices; an array may be a transposed view.

    Raises:
        ValueError: the file ends early, because it was changed.
    """
    targets = [target for target in targets if target.array.size]
    if not targets:  # vocabulary padding only
        return
    dtype = DTYPES[record.dtype]
    row_bytes = dtype.itemsize * math.prod(record.shape[1:])
    if all(_whole_rows(target, record) for target in targets):
        for target in targets:
            data = target.array.reshape(-1).view(np.uint8).data
            _read_exactly(descriptor, [data], record, target.rows.start * row_bytes)
        return
    first = min(target.rows.start for target in targets)
    last = max(target.rows.stop for target in targets)
    height = max(1, min(last - first, _BLOCK_BYTES // row_bytes, 512))
    # Rows are an odd number of cache lines apart: a power of two would map a column's elements to
    # one cache set, and transposing would drop from 4 to 1.2 GB/s.
    pitch = (-(-row_bytes // 64) | 1) * 64
    scratch = np.empty((height, pitch), np.uint8)[:, :row_bytes]
    block, lines = scratch.view(dtype), [row.data for row in scratch]
    for start in range(first, last, height):
        stop = min(start + height, last)
        _read_exactly(descriptor, lines[: stop - start], record, start * row_bytes)
        for array, rows, columns in targets:
            low, high = max(start, rows.start), min(stop, rows.stop)
            if low < high:
                array[low - rows.start : high - rows.start] = block[
                    low - start : high - start, columns
                ]


def _whole_rows(target: Target, record: TensorRecord) -> bool:
    """Whether the target is a contiguous piece of the file."""
    return target.array.flags.c_contiguous and target.array.shape[1:] == record.shape[1:]


def _read_exactly(
    descriptor: int, buffers: Sequence[memoryview], record: TensorRecord, position: int
) -> None:
    """Fill the buffers from a byte position of the tensor; a single read may return less."""
    left, offset = list(buffers), record.offset + position
    while left:
        count = os.preadv(descriptor, left, offset)
        if count == 0:
            raise ValueError(f"{record.file}: ends inside {record.name}: it changed while loading")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def same_bytes(first: TensorRecord, second: TensorRecord) -> bool:
    """Compare two tensors bit by bit, a few megabytes at a time."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as left, second.file.open("rb") as right:
        left.seek(first.offset)
        right.seek(second.offset)
        for start in range(0, first.nbytes, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, first.nbytes - start)
            if left.read(count) != right.read(count):
                return False
    return True


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    *,
    dtype: np.dtype,
) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        path: the file to create.
        shapes: tensor name → shape, in the order of `arrays`.
        arrays: the tensors, C-contiguous, consumed one at a time.
        dtype: the dtype of all of them.

    Raises:
        ValueError: an array has another shape or dtype than announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {dtype}{list(shape)}, got {array.dtype}{list(array.shape)}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
