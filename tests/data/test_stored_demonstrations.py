"""The store of demonstrations on disk: interrupted, shared, damaged and made again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.data import storage
from ivl_jax.data.demonstrations import (
    store_demonstrations,
)
from tests.data.demonstration_files import QUESTION_ANSWER, row_of, source_of, write


def test_an_interrupted_store_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(write(tmp_path / "train.jsonl", [row_of(i) for i in range(20)]))
    generate = storage.IvlDemonstrations._generate_examples

    def stop_half_way(self: Any, rows: Any) -> Any:
        for index, example in generate(self, rows):
            if index == 7:
                raise KeyboardInterrupt
            yield index, example

    monkeypatch.setattr(storage.IvlDemonstrations, "_generate_examples", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        store_demonstrations(source, data_dir=tmp_path / "store")
    monkeypatch.undo()
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert sum(stored.counts.values()) == 20
    assert len(stored.open("train")) == stored.counts["train"]


def test_storing_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = source_of(write(tmp_path / "train.jsonl", [row_of(i) for i in range(5)]))
    store_demonstrations(source, data_dir=tmp_path / "store").open("train")
    assert capfd.readouterr().out == ""


def test_processes_that_store_at_once_agree_and_need_no_tensorflow(
    tmp_path: Path, project_root: Path
) -> None:
    train = write(tmp_path / "train.jsonl", [row_of(i) for i in range(200)])
    program = f"""
import importlib.util, sys
find, absent = importlib.util.find_spec, ("torch", "tensorflow")
importlib.util.find_spec = lambda name, *rest: None if name in absent else find(name, *rest)
from ivl_jax.data.demonstrations import DemonstrationSource, store_demonstrations
source = DemonstrationSource(({train!r},), row_format="fields", templates={QUESTION_ANSWER!r})
stored = store_demonstrations(source, data_dir={str(tmp_path / "store")!r})
print(stored.fingerprint, stored.counts, stored.open("train")[0].row_id)
assert not set(absent) & set(sys.modules)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=project_root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert "train.jsonl:1" in outputs[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record", "manifest"])
def test_a_damaged_store_is_reported_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    source = source_of(write(tmp_path / "train.jsonl", [row_of(i) for i in range(20)]))
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    rows = [stored.open("train")[index] for index in range(len(stored.open("train")))]
    (file,) = stored.folder.glob("*train.array_record*")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        record = stored.folder.parent / f"{'source' if damage == 'record' else damage}.json"
        record.write_text(record.read_text().replace('"train": ', '"train": 1'))
    caplog.clear()
    again = store_demonstrations(source, data_dir=tmp_path / "store")
    assert "the stored demonstrations of" in caplog.text
    assert "were changed after they were written and are made again" in caplog.text
    assert again.counts == stored.counts
    assert [again.open("train")[index] for index in range(len(rows))] == rows
    caplog.clear()
    assert store_demonstrations(source, data_dir=tmp_path / "store") == again
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    left = sorted(path.name for path in stored.folder.parent.parent.iterdir())
    assert [name for name in left if not name.endswith(".lock")] == [stored.folder.parent.name]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"rule": 1, "hashes": 3}'])
def test_a_broken_record_of_another_dataset_blocks_nothing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    other = source_of(write(tmp_path / "other.jsonl", [row_of(i) for i in range(3)]))
    stored = store_demonstrations(other, data_dir=tmp_path / "store")
    (stored.folder.parent / "source.json").write_bytes(content)
    source = source_of(write(tmp_path / "train.jsonl", [row_of(i) for i in range(5)]))
    assert store_demonstrations(source, data_dir=tmp_path / "store").counts["train"] == 4
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
