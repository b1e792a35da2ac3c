"""The hash manifest names every file that is not as it was written."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivl_jax.manifest import (
    MANIFEST_NAME,
    ManifestError,
    file_problems,
    hash_files,
    read_manifest,
    write_manifest,
)
from ivl_jax.paths import absolute_path, write_atomically


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files, one in a sub-folder, one empty, sealed with a manifest."""
    root = tmp_path / "sealed"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "top.bin").write_bytes(bytes(range(256)))
    (root / "deep" / "er" / "leaf").write_bytes(b"leaf")
    (root / "deep" / "empty").write_bytes(b"")
    write_manifest(root, {"step": 3})
    return root


def test_hashes_of_another_process_give_the_same_manifest(folder: Path) -> None:
    before = read_manifest(folder)
    (folder / MANIFEST_NAME).unlink()
    hashed = hash_files(folder, "deep")
    assert set(hashed) == {"deep/er/leaf", "deep/empty"}
    assert write_manifest(folder, {"step": 3}, hashed=hashed) == before
    assert hash_files(folder, "absent") == {}
    # They are taken as they are, not read again.
    hashed["deep/er/leaf"]["sha256"] = "0"
    write_manifest(folder, {"step": 3}, hashed=hashed)
    (problem,) = file_problems(folder, read_manifest(folder))
    assert problem.startswith("deep/er/leaf: altered: expected SHA-256 0")
    (folder / "deep" / "empty").unlink()
    with pytest.raises(FileNotFoundError, match="was hashed elsewhere, but is not here"):
        write_manifest(folder, {"step": 3}, hashed=hashed)


def test_shares_of_a_check_find_all_problems_between_them(folder: Path) -> None:
    manifest = read_manifest(folder)
    for name in manifest.files:
        (folder / name).write_bytes(b"x" * (manifest.files[name]["bytes"] + 1))
    shares = [file_problems(folder, manifest, share=(index, 2)) for index in range(2)]
    assert all(shares)
    assert sorted([*shares[0], *shares[1]]) == sorted(file_problems(folder, manifest))


def test_an_untouched_folder_has_no_problems(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert file_problems(folder, manifest) == ()
    assert manifest.about == {"step": 3}
    assert sorted(manifest.files) == ["deep/empty", "deep/er/leaf", "top.bin"]
    assert manifest.total_bytes == 260


def test_the_hashes_are_those_of_sha256sum(folder: Path) -> None:
    printed = subprocess.run(
        ["sha256sum", folder / "top.bin"], check=True, capture_output=True, text=True
    )
    assert read_manifest(folder).files["top.bin"]["sha256"] == printed.stdout.split()[0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_one_flipped_bit_is_found_and_its_file_named(folder: Path, data: st.DataObject) -> None:
    names = ["top.bin", "deep/er/leaf", MANIFEST_NAME]
    name = data.draw(st.sampled_from(names))
    path = folder / name
    original = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    altered = bytearray(original)
    altered[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(altered)
    try:
        if name == MANIFEST_NAME:
            # Only white space between the entries carries nothing.
            if bytes(altered).split() != original.split():
                with pytest.raises(ManifestError, match=r"manifest\.json"):
                    read_manifest(folder)
        else:
            (problem,) = file_problems(folder, read_manifest(folder))
            assert problem.startswith(f"{name}: altered: expected SHA-256 ")
    finally:
        path.write_bytes(original)


def test_missing_and_truncated_files_are_named_with_their_sizes(folder: Path) -> None:
    (folder / "top.bin").write_bytes(b"123")
    (folder / "deep" / "er" / "leaf").unlink()
    manifest = read_manifest(folder)
    expected = ("deep/er/leaf: missing", "top.bin: expected 256 bytes, found 3")
    assert file_problems(folder, manifest) == expected
    assert file_problems(folder, manifest, sizes_only=True) == expected


def test_sizes_only_reads_no_file(folder: Path) -> None:
    (folder / "deep" / "er" / "leaf").write_bytes(b"LEAF")
    manifest = read_manifest(folder)
    assert file_problems(folder, manifest, sizes_only=True) == ()
    assert len(file_problems(folder, manifest)) == 1


def test_files_added_later_are_fine(folder: Path) -> None:
    (folder / "README.md").write_text("about this checkpoint")
    assert file_problems(folder, read_manifest(folder)) == ()


def test_a_folder_without_manifest_says_that_it_is_incomplete(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(ManifestError, match=r"manifest\.json is missing"):
        read_manifest(folder)


def test_a_manifest_of_an_unknown_format_is_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("ivl_jax.manifest.MANIFEST_FORMAT", 2)
    write_manifest(folder, {})
    monkeypatch.undo()
    with pytest.raises(ManifestError, match="has format 2, but this version of ivl_jax reads 1"):
        read_manifest(folder)


def test_a_forged_value_in_the_manifest_is_found(folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["about"]["step"] = 4
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="altered: expected SHA-256"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": None}, "field 'files': expected an object, got null"),
        ({"about": [1]}, "field 'about': expected an object, got a list"),
        ({"files": {"top.bin": {"bytes": 1}}}, "'top.bin': expected 'bytes' and 'sha256'"),
        ({"files": {"top.bin": 3}}, "'top.bin': expected 'bytes' and 'sha256'"),
        ({"files": {"../a": {"bytes": 1, "sha256": ""}}}, "'../a' is outside the folder"),
        ({"format": None}, "has format None"),
    ],
)
def test_a_manifest_with_a_right_checksum_and_wrong_fields_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text()) | change
    del content["checksum"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=re.escape(message)):
        read_manifest(folder)


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"


def test_problems_are_listed_up_to_twenty_and_then_counted(tmp_path: Path) -> None:
    for index in range(25):
        (tmp_path / f"{index:02}").write_bytes(b"x")
    manifest = write_manifest(tmp_path, {})
    for index in range(25):
        (tmp_path / f"{index:02}").unlink()
    problems = file_problems(tmp_path, manifest)
    assert len(problems) == 21
    assert problems[-1] == "and 5 more"


def test_reading_manifests_imports_no_jax(project_root: Path) -> None:
    code = "import sys, ivl_jax.checkpoint.steps; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project_root)


def test_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert os.fspath(absolute_path("runs/../a")) == str(tmp_path / "a")
    assert os.fspath(absolute_path("~/a")) == os.path.expanduser("~/a")
    # Whether its package is there, and the bucket, is another question.
    monkeypatch.setattr("ivl_jax.paths._prepare_gcs", lambda path: None)
    assert os.fspath(absolute_path("gs://bucket/runs/a")) == "gs://bucket/runs/a"
