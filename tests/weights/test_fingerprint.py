"""A fingerprint tells weights apart, and reads only what has changed."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ivl_jax.weights import fingerprint
from ivl_jax.weights.fingerprint import combined_fingerprint, weights_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of two weights files."""
    (tmp_path / "model").mkdir()
    for number in (1, 2):
        tensors = {"w": np.full(100, number, np.float32)}
        save_file(tensors, tmp_path / "model" / f"model-{number}.safetensors")
    return tmp_path / "model"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []
    original = fingerprint._hash_files

    def spy(folder: Path, paths: list[Path]) -> list[str]:
        names.extend(path.name for path in paths)
        return original(folder, paths)

    monkeypatch.setattr(fingerprint, "_hash_files", spy)
    return names


def test_one_bit_makes_another_fingerprint_and_only_its_file_is_read_again(
    folder: Path, tmp_path: Path, hashed: list[str]
) -> None:
    remembered = tmp_path / "memory" / "model.json"
    before = weights_fingerprint(folder, remembered=remembered)
    assert hashed == ["model-1.safetensors", "model-2.safetensors"]
    assert weights_fingerprint(folder, remembered=remembered) == before
    assert len(hashed) == 2
    path = folder / "model-2.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    # The times of `cp --preserve` or rsync: size and time of change say nothing.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_fingerprint(folder, remembered=remembered) != before
    assert hashed[2:] == ["model-2.safetensors"]


def test_a_memory_changes_no_fingerprint(folder: Path, tmp_path: Path) -> None:
    remembered = tmp_path / "model.json"
    alone = weights_fingerprint(folder)
    assert weights_fingerprint(folder, remembered=remembered) == alone
    assert weights_fingerprint(folder, remembered=remembered) == alone
    (folder / "model-1.safetensors").rename(folder / "model-3.safetensors")
    assert (
        weights_fingerprint(folder, remembered=remembered) == weights_fingerprint(folder) != alone
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model-1.safetensors": [1]}'])
def test_a_damaged_memory_is_only_forgotten(folder: Path, tmp_path: Path, content: bytes) -> None:
    remembered = tmp_path / "model.json"
    remembered.write_bytes(content)
    assert weights_fingerprint(folder, remembered=remembered) == weights_fingerprint(folder)


def test_several_models_are_identified_in_their_order() -> None:
    assert combined_fingerprint(["a"]) == "a"
    assert (
        len({combined_fingerprint(x) for x in (["a", "b"], ["b", "a"], ["a"], ["a", "b", "b"])})
        == 4
    )
