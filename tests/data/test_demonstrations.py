"""Demonstrations are stored once, split by content, and a source that changed is noticed."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.data import demonstrations, storage
from ivl_jax.data.demonstrations import (
    DemonstrationSource,
    MalformedRowsError,
    Message,
    StoredDemonstrations,
    store_demonstrations,
)
from ivl_jax.data.formats import SourceError

QUESTION_ANSWER = {"user": "{question}", "assistant": "{answer}"}


def _write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _row(number: int, **more: Any) -> dict[str, Any]:
    return {"question": f"What is {number}?", "answer": f"It is ü{number}.", **more}


def _source(*train: str, **options: Any) -> DemonstrationSource:
    return DemonstrationSource(train, row_format="fields", templates=QUESTION_ANSWER, **options)


def _ids(stored: StoredDemonstrations, split: str) -> list[str]:
    return [demonstration.row_id for demonstration in stored.open(split)]


@pytest.fixture
def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes storing anything an error from the moment it is called."""

    def forbid() -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("stored again")

        monkeypatch.setattr(demonstrations, "write_dataset", fail)

    return forbid


def test_what_is_stored_is_what_was_read_in_order(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", [_row(i) for i in range(5)])
    test = _write(tmp_path / "test.jsonl", [_row(7)])
    source = _source(train, test=(test,), validation_fraction=0.0)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts == {"train": 5, "test": 1}
    split = stored.open("train")
    assert len(split) == 5
    expected = (Message("user", "What is 3?"), Message("assistant", "It is ü3."))
    assert split[3].messages == expected
    assert _ids(stored, "train") == [f"train.jsonl:{line}" for line in range(1, 6)]
    assert split[1:3] == [split[1], split[2]]
    assert stored.open("test")[0].row_id == "test.jsonl:1"
    with pytest.raises(KeyError, match="no split 'validation'"):
        stored.open("validation")
    with pytest.raises(IndexError):
        split[5]
    assert (stored.folder / "dataset_info.json").exists()
    assert list(stored.folder.glob("*.array_record-*"))


def test_a_second_call_reads_what_the_first_stored(tmp_path: Path, forbid_writing: Any) -> None:
    source = _source(_write(tmp_path / "train.jsonl", [_row(i) for i in range(5)]))
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    forbid_writing()
    again = store_demonstrations(source, data_dir=tmp_path / "store")
    assert again == stored
    assert _ids(again, "train") == _ids(stored, "train")


def test_the_same_content_elsewhere_is_the_same_dataset(
    tmp_path: Path, forbid_writing: Any
) -> None:
    rows = [_row(i) for i in range(5)]
    first = _source(_write(tmp_path / "a" / "train.jsonl", rows))
    stored = store_demonstrations(first, data_dir=tmp_path / "store")
    forbid_writing()
    second = _source(_write(tmp_path / "b" / "train.jsonl", rows))
    assert store_demonstrations(second, data_dir=tmp_path / "store") == stored


def test_a_changed_source_is_named_and_stored_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    source = _source(_write(path, [_row(i) for i in range(5)]))
    before = store_demonstrations(source, data_dir=tmp_path / "store")
    assert "has changed" not in caplog.text
    _write(path, [_row(i) for i in range(6)])
    with caplog.at_level(logging.WARNING):
        after = store_demonstrations(source, data_dir=tmp_path / "store")
    assert f"{path} has changed since it was stored" in caplog.text
    assert after.fingerprint != before.fingerprint
    assert sum(after.counts.values()) == 6
    assert sum(len(before.open(split)) for split in before.counts) == 5, "the old copy stays"
    caplog.clear()
    assert store_demonstrations(source, data_dir=tmp_path / "store") == after
    assert "has changed" not in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"templates": {**QUESTION_ANSWER, "system": "Be {question}"}},
        {"validation_fraction": 0.4},
        {"group_field": "question"},
    ],
)
def test_another_way_of_reading_is_another_dataset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    train = _write(tmp_path / "train.jsonl", [_row(i) for i in range(5)])
    options: dict[str, Any] = {"row_format": "fields", "templates": QUESTION_ANSWER}
    first = store_demonstrations(DemonstrationSource((train,), **options), data_dir=tmp_path)
    changed = DemonstrationSource((train,), **{**options, **change})
    second = store_demonstrations(changed, data_dir=tmp_path)
    assert first.fingerprint != second.fingerprint
    assert "has changed" not in caplog.text


def test_a_share_of_the_rows_is_held_out_by_content(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(400)]
    source = _source(_write(tmp_path / "a.jsonl", rows), validation_fraction=0.25)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts["train"] + stored.counts["validation"] == 400
    assert 70 <= stored.counts["validation"] <= 130  # 100 expected, three deviations wide
    held_out = {demonstration.messages for demonstration in stored.open("validation")}
    assert not held_out & {demonstration.messages for demonstration in stored.open("train")}

    shuffled = _source(_write(tmp_path / "b.jsonl", rows[::-1] + rows), validation_fraction=0.25)
    again = store_demonstrations(shuffled, data_dir=tmp_path / "store")
    assert {demonstration.messages for demonstration in again.open("validation")} == held_out
    assert again.counts["validation"] == 2 * stored.counts["validation"]


def test_rows_of_one_group_stay_on_one_side(tmp_path: Path) -> None:
    rows = [_row(i, meta={"module": f"m{i % 12}"}) for i in range(120)]
    source = _source(
        _write(tmp_path / "a.jsonl", rows), validation_fraction=0.3, group_field="meta.module"
    )
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    modules = [
        {int(row_id.split(":")[1]) % 12 for row_id in _ids(stored, split)}
        for split in ("train", "validation")
    ]
    assert modules[0].isdisjoint(modules[1])
    assert all(modules)


def test_few_rows_still_give_one_to_validate_on(tmp_path: Path) -> None:
    source = _source(_write(tmp_path / "a.jsonl", [_row(i) for i in range(3)]))
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts == {"train": 2, "validation": 1}


def test_explicit_validation_files_leave_the_training_rows_alone(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", [_row(i) for i in range(100)])
    held_out = _write(tmp_path / "dev.jsonl", [_row(i) for i in range(100, 104)])
    source = _source(train, validation=(held_out,), validation_fraction=0.5)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts == {"train": 100, "validation": 4}
    assert _ids(stored, "validation") == [f"dev.jsonl:{line}" for line in range(1, 5)]


def test_few_malformed_rows_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forbid_writing: Any
) -> None:
    rows = [_row(i) for i in range(98)] + ['{"question": ', {"question": "Why?"}]
    source = _source(_write(tmp_path / "train.jsonl", rows), validation_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        stored = store_demonstrations(source, data_dir=tmp_path / "store", max_malformed_share=0.02)
    assert stored.counts == {"train": 98}
    assert stored.malformed_count == 2
    assert "2 of 100 rows are malformed" in caplog.text
    assert "train.jsonl:99: not JSON" in caplog.text
    assert "train.jsonl:100: no field 'answer'; the row has 'question'" in caplog.text
    caplog.clear()
    forbid_writing()
    store_demonstrations(source, data_dir=tmp_path / "store", max_malformed_share=0.02)
    assert "2 of 100 rows are malformed" in caplog.text, "said on every run"
    with pytest.raises(MalformedRowsError):
        store_demonstrations(source, data_dir=tmp_path / "store", max_malformed_share=0.01)


def test_many_malformed_rows_stop_before_anything_is_stored(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(97)] + [{"question": "Why?"}] * 3
    source = _source(_write(tmp_path / "train.jsonl", rows))
    with pytest.raises(MalformedRowsError, match=r"3 of 100 rows are malformed \(3\.0%") as caught:
        store_demonstrations(source, data_dir=tmp_path / "store")
    assert "train.jsonl:98: no field 'answer'" in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_source_without_a_dialogue_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MalformedRowsError, match="0 of 0 rows"):
        store_demonstrations(_source(str(tmp_path / "empty.jsonl")), data_dir=tmp_path / "store")


def test_trimmed_turns_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"from": role, "value": "x"} for role in ("gpt", "human", "gpt", "human")]
    train = _write(tmp_path / "train.jsonl", [{"conversations": turns}])
    source = DemonstrationSource((train,), row_format="sharegpt", validation_fraction=0.0)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.trimmed_count == 1
    assert "1 dialogues begin with an assistant's turn or end with a user's" in caplog.text


def test_an_interrupted_store_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(_write(tmp_path / "train.jsonl", [_row(i) for i in range(20)]))
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
    source = _source(_write(tmp_path / "train.jsonl", [_row(i) for i in range(5)]))
    store_demonstrations(source, data_dir=tmp_path / "store").open("train")
    assert capfd.readouterr().out == ""


def test_processes_that_store_at_once_agree_and_need_no_tensorflow(
    tmp_path: Path, project_root: Path
) -> None:
    train = _write(tmp_path / "train.jsonl", [_row(i) for i in range(200)])
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


def test_the_same_file_twice_is_another_dataset_and_its_repeated_rows_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forbid_writing: Any
) -> None:
    train = _write(tmp_path / "train.jsonl", [_row(i) for i in range(5)])
    once = store_demonstrations(_source(train), data_dir=tmp_path / "store")
    assert (once.repeated_count, caplog.text) == (0, "")
    twice = store_demonstrations(_source(train, train), data_dir=tmp_path / "store")
    assert twice.fingerprint != once.fingerprint
    assert sum(twice.counts.values()) == 10
    assert twice.repeated_count == 5
    said = "5 rows of data.train repeat the dialogue of an earlier one"
    assert said in caplog.text
    caplog.clear()
    forbid_writing()
    assert store_demonstrations(_source(train, train), data_dir=tmp_path / "store") == twice
    assert said in caplog.text, "said on every run"


def test_what_is_trained_on_cannot_be_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [_row(i) for i in range(5)]
    train, other = _write(tmp_path / "a.jsonl", rows), _write(tmp_path / "b.jsonl", [_row(9)])
    copy = _write(tmp_path / "copy.jsonl", rows)
    for options, named in (
        ({"validation": (other, train)}, "data.validation is also trained on"),
        ({"validation": (copy,)}, "the same as .*copy.jsonl, byte for byte"),
        ({"test": (train,)}, "data.test is also trained on"),
    ):
        with pytest.raises(SourceError, match=named):
            store_demonstrations(_source(train, **options), data_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    part = _write(tmp_path / "part.jsonl", [_row(7), _row(2, more="fields"), _row(3)])
    stored = store_demonstrations(_source(train, validation=(part,)), data_dir=tmp_path / "store")
    assert stored.leaked_counts == {"validation": 2}
    assert "2 dialogues of data.validation are also in data.train" in caplog.text


def test_weights_are_stored_and_move_no_dialogue_to_another_split(tmp_path: Path) -> None:
    def rows(weight: int) -> list[Any]:
        return [
            {
                "messages": [
                    {"role": "user", "content": f"{number}?"},
                    {"role": "assistant", "content": "No", "weight": weight},
                    {"role": "user", "content": "Again"},
                    {"role": "assistant", "content": "Yes"},
                ]
            }
            for number in range(40)
        ]

    found = []
    for weight in (0, 1):
        train = _write(tmp_path / f"{weight}" / "train.jsonl", rows(weight))
        source = DemonstrationSource((train,), validation_fraction=0.3)
        stored = store_demonstrations(source, data_dir=tmp_path / "store")
        turns = stored.open("train")[0].messages
        assert [turn.weight for turn in turns] == [1, weight, 1, 1]
        found.append((stored.counts, _ids(stored, "validation")))
        assert stored.fingerprint.endswith("/weights") == (weight == 0)
        assert stored.unweighted_count == (40 if weight == 0 else 0)
    assert found[0] == found[1]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record", "manifest"])
def test_a_damaged_store_is_reported_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    source = _source(_write(tmp_path / "train.jsonl", [_row(i) for i in range(20)]))
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
    assert caplog.text == ""
    left = sorted(path.name for path in stored.folder.parent.parent.iterdir())
    assert [name for name in left if not name.endswith(".lock")] == [stored.folder.parent.name]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b'{"rule": 1, "hashes": 3}'])
def test_a_broken_record_of_another_dataset_blocks_nothing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    other = _source(_write(tmp_path / "other.jsonl", [_row(i) for i in range(3)]))
    stored = store_demonstrations(other, data_dir=tmp_path / "store")
    (stored.folder.parent / "source.json").write_bytes(content)
    source = _source(_write(tmp_path / "train.jsonl", [_row(i) for i in range(5)]))
    assert store_demonstrations(source, data_dir=tmp_path / "store").counts["train"] == 4
    assert caplog.text == ""


def test_gsm8k_reads_whole(gsm8k_dir: Path, tmp_path: Path) -> None:
    source = _source(str(gsm8k_dir / "train.jsonl"), validation=(str(gsm8k_dir / "test.jsonl"),))
    stored = store_demonstrations(source, data_dir=tmp_path)
    assert stored.counts == {"train": 7473, "validation": 1319}
    assert stored.malformed_count == 0
    last = stored.open("validation")[1318]
    assert last.row_id == "test.jsonl:1319"
    row = json.loads((gsm8k_dir / "test.jsonl").read_text().splitlines()[-1])
    assert last.messages == (Message("user", row["question"]), Message("assistant", row["answer"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ()}, "no training source"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"templates": {}}, "needs user_template and assistant_template"),
    ],
)
def test_a_source_is_checked_before_it_is_read(options: dict[str, Any], message: str) -> None:
    defaults = {"train": ("a",), "row_format": "fields", "templates": QUESTION_ANSWER}
    with pytest.raises(ValueError, match=message):
        DemonstrationSource(**{**defaults, **options})
