import json
import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ivl_jax.weights import safetensors_file
from ivl_jax.weights.safetensors_file import (
    Target,
    TensorRecord,
    read_header,
    read_slices,
    same_bytes,
    write_file,
)


def _write_raw(path: Path, header: str, data: bytes) -> Path:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_header_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.float16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    records = read_header(tmp_path / "x.safetensors")
    assert set(records) == set(tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, array in tensors.items():
        record = records[name]
        assert record.shape == array.shape
        assert content[record.offset : record.offset + record.nbytes] == array.tobytes()


def test_what_write_file_writes_the_safetensors_package_reads(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
        "b": np.arange(5).astype(jnp.bfloat16),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    path = tmp_path / "x.safetensors"
    write_file(path, shapes, arrays.values(), dtype=np.dtype(jnp.bfloat16))
    read = load_file(path)
    assert list(read) == ["a", "b"]
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert read_header(path)["a"].offset % 8 == 0


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((2, 3), np.float32), r"float32\[2, 3\]"),
        (np.zeros((3, 2), np.int32), r"int32\[3, 2\]"),
    ],
)
def test_write_file_refuses_an_array_that_was_not_announced(
    tmp_path: Path, array: np.ndarray, got: str
) -> None:
    path, dtype = tmp_path / "x.safetensors", np.dtype(np.float32)
    with pytest.raises(ValueError, match=rf"a: expected float32\[3, 2\], got {got}"):
        write_file(path, {"a": (3, 2)}, [array], dtype=dtype)


@pytest.mark.parametrize("kept", [0, 5, 40, 150])
def test_a_truncated_file_is_named_with_its_sizes(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": np.zeros((4, 8), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError,
        match=rf"cut\.safetensors: truncated: expected .*, got {kept}|"
        rf"cut\.safetensors: truncated: expected a header of .* got {kept - 8}",
    ):
        read_header(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="bytes after the last tensor"):
        read_header(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ('"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
         '"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}', "b: expected its bytes to start"),
        ('"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}', "a: expected its bytes to start"),
        ('"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}', "expected 12 bytes for F32"),
        ('"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}', "a: shape: .*got .-2, -1"),
        ('"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}', "a: shape: expected at most"),
        ('"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}', "a: shape: expected at most"),
        ('"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}', "a: shape: .*Infinity"),
        ('"a":{"dtype":"F32","shape":[' + "9" * 19 + '],"data_offsets":[0,8]}', "a: shape: "),
        ('"a":{"dtype":"F32","shape":[' + "1," * 40 + '2],"data_offsets":[0,8]}', "a: shape: .*…"),
        ('"a":{"dtype":"F4","shape":[2],"data_offsets":[8,0]}', r"a: data_offsets: .*got \[8, 0"),
        ('"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}', "a: data_offsets: expected"),
        ('"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}', "a: data_offsets: expected"),
        ('"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}', "a: dtype: .*got a list"),
        ('"a":' + "[" * 2000, "bad.safetensors, line 1, column 105: nested too deeply"),
        ('"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
         '"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}', "column 55: .*'a' appears twice"),
        ('"a":{"dtype":"F32","shape":[2]}', "data_offsets"),
        ('"a":[1,2]', r"bad\.safetensors: a: expected an object, got a list"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, entries: str, message: str
) -> None:
    path = _write_raw(tmp_path / "bad.safetensors", "{" + entries + "}", bytes(12))
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_a_folder_without_safetensors_is_reported(tmp_path: Path) -> None:
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_header(pointer)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(noise)
    with pytest.raises(ValueError, match=r"list\.safetensors: expected an object .*got an empty"):
        read_header(_write_raw(tmp_path / "list.safetensors", "[]", b""))


@st.composite
def _slices(draw: st.DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size))
    return slice(start, draw(st.integers(start, size)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), transposed=st.booleans(), block=st.sampled_from([1, 64, 1 << 21]))
def test_any_slices_are_read_like_numpy_slices(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, transposed: bool, block: int
) -> None:
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    full = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    path = tmp_path_factory.mktemp("slices") / "x.safetensors"
    save_file({"before": np.zeros(3, np.float32), "x": full}, path)
    targets = []
    for _ in range(data.draw(st.integers(1, 3))):
        cut = (data.draw(_slices(rows)), data.draw(_slices(columns)))
        shape = full[cut].shape
        array = np.full(shape[::-1], np.nan, np.float32).T if transposed else np.empty(shape, "f4")
        targets.append(Target(array, *cut))
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(safetensors_file, "_BLOCK_BYTES", block)
        read_slices(file.fileno(), read_header(path)["x"], targets)
    for target in targets:
        np.testing.assert_array_equal(target.array, full[target.rows, target.columns])


def test_reads_that_return_less_than_asked_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = np.arange(60, dtype=np.float32).reshape(6, 10)
    save_file({"x": full}, tmp_path / "x.safetensors")
    read = os.preadv

    def stingy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return read(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    record = read_header(tmp_path / "x.safetensors")["x"]
    whole, turned = np.empty((6, 10), np.float32), np.empty((10, 6), np.float32)
    with record.file.open("rb") as file:
        for array in (whole, turned.T):
            read_slices(file.fileno(), record, [Target(array, slice(0, 6), slice(0, 10))])
    np.testing.assert_array_equal(whole, full)
    np.testing.assert_array_equal(turned, full.T)


def test_an_empty_slice_behind_the_tensor_reads_nothing(tmp_path: Path) -> None:
    # What a device holds whose vocabulary rows are all padding; the tensor is the file's last.
    save_file({"x": np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    record = read_header(tmp_path / "x.safetensors")["x"]
    behind = Target(np.empty((2, 0), np.float32).T, slice(8, 8), slice(0, 2))
    last = Target(np.empty((2, 1), np.float32).T, slice(1, 2), slice(0, 2))
    with record.file.open("rb") as file:
        read_slices(file.fileno(), record, [behind])
        read_slices(file.fileno(), record, [last, behind])
    np.testing.assert_array_equal(last.array, [[1, 1]])


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros((6, 10), np.float32)}, path)
    record = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    target = Target(np.empty((6, 10), np.float32), slice(0, 6), slice(0, 10))
    with path.open("rb") as file, pytest.raises(ValueError, match="changed while loading"):
        read_slices(file.fileno(), record, [target])


@pytest.mark.parametrize("block", [16, 1 << 21])
def test_same_bytes_sees_one_bit_and_other_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(safetensors_file, "_BLOCK_BYTES", block)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    other = x.copy()
    other.view(np.uint8)[2, 15] ^= 1
    nan = np.full((3, 4), np.nan, np.float32)
    tensors = {"x": x, "same": x.copy(), "other": other, "turned": x.reshape(4, 3).copy()}
    save_file(tensors | {"nan": nan, "nan2": nan.copy()}, tmp_path / "x.safetensors")
    records: dict[str, TensorRecord] = read_header(tmp_path / "x.safetensors")
    assert same_bytes(records["x"], records["same"])
    assert same_bytes(records["nan"], records["nan2"])
    assert not same_bytes(records["x"], records["other"])
    assert not same_bytes(records["x"], records["turned"])


def test_written_headers_are_json_padded_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": (2,)}, [np.ones(2, np.float32)], dtype=np.dtype(np.float32))
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}  # transformers refuses files without it
