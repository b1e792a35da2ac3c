"""Demonstrations are stored once, split by content, and a source that changed is noticed."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.data import demonstrations
from ivl_jax.data.demonstrations import (
    DemonstrationSource,
    MalformedRowsError,
    Message,
    store_demonstrations,
)
from ivl_jax.data.formats import SourceError
from tests.data.demonstration_files import (
    QUESTION_ANSWER,
    row_ids,
    row_of,
    source_of,
    write,
)


@pytest.fixture
def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes storing anything an error from the moment it is called."""

    def forbid() -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("stored again")

        monkeypatch.setattr(demonstrations, "write_dataset", fail)

    return forbid


def test_what_is_stored_is_what_was_read_in_order(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [row_of(i) for i in range(5)])
    test = write(tmp_path / "test.jsonl", [row_of(7)])
    source = source_of(train, test=(test,), validation_fraction=0.0)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts == {"train": 5, "test": 1}
    split = stored.open("train")
    assert len(split) == 5
    expected = (Message("user", "What is 3?"), Message("assistant", "It is ü3."))
    assert split[3].messages == expected
    assert row_ids(stored, "train") == [f"train.jsonl:{line}" for line in range(1, 6)]
    assert split[1:3] == [split[1], split[2]]
    assert stored.open("test")[0].row_id == "test.jsonl:1"
    with pytest.raises(KeyError, match="no split 'validation'"):
        stored.open("validation")
    with pytest.raises(IndexError):
        split[5]
    assert (stored.folder / "dataset_info.json").exists()
    assert list(stored.folder.glob("*.array_record-*"))


def test_a_second_call_reads_what_the_first_stored(tmp_path: Path, forbid_writing: Any) -> None:
    source = source_of(write(tmp_path / "train.jsonl", [row_of(i) for i in range(5)]))
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    forbid_writing()
    again = store_demonstrations(source, data_dir=tmp_path / "store")
    assert again == stored
    assert row_ids(again, "train") == row_ids(stored, "train")


def test_the_same_content_elsewhere_is_the_same_dataset(
    tmp_path: Path, forbid_writing: Any
) -> None:
    rows = [row_of(i) for i in range(5)]
    first = source_of(write(tmp_path / "a" / "train.jsonl", rows))
    stored = store_demonstrations(first, data_dir=tmp_path / "store")
    forbid_writing()
    second = source_of(write(tmp_path / "b" / "train.jsonl", rows))
    assert store_demonstrations(second, data_dir=tmp_path / "store") == stored


def test_a_changed_source_is_named_and_stored_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    source = source_of(write(path, [row_of(i) for i in range(5)]))
    before = store_demonstrations(source, data_dir=tmp_path / "store")
    assert "has changed" not in caplog.text
    write(path, [row_of(i) for i in range(6)])
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
    train = write(tmp_path / "train.jsonl", [row_of(i) for i in range(5)])
    options: dict[str, Any] = {"row_format": "fields", "templates": QUESTION_ANSWER}
    first = store_demonstrations(DemonstrationSource((train,), **options), data_dir=tmp_path)
    changed = DemonstrationSource((train,), **{**options, **change})
    second = store_demonstrations(changed, data_dir=tmp_path)
    assert first.fingerprint != second.fingerprint
    assert "has changed" not in caplog.text


def test_a_share_of_the_rows_is_held_out_by_content(tmp_path: Path) -> None:
    rows = [row_of(i) for i in range(400)]
    source = source_of(write(tmp_path / "a.jsonl", rows), validation_fraction=0.25)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts["train"] + stored.counts["validation"] == 400
    assert 70 <= stored.counts["validation"] <= 130  # 100 expected, three deviations wide
    held_out = {demonstration.messages for demonstration in stored.open("validation")}
    assert not held_out & {demonstration.messages for demonstration in stored.open("train")}

    shuffled = source_of(write(tmp_path / "b.jsonl", rows[::-1] + rows), validation_fraction=0.25)
    again = store_demonstrations(shuffled, data_dir=tmp_path / "store")
    assert {demonstration.messages for demonstration in again.open("validation")} == held_out
    assert again.counts["validation"] == 2 * stored.counts["validation"]


def test_rows_of_one_group_stay_on_one_side(tmp_path: Path) -> None:
    rows = [row_of(i, meta={"module": f"m{i % 12}"}) for i in range(120)]
    source = source_of(
        write(tmp_path / "a.jsonl", rows), validation_fraction=0.3, group_field="meta.module"
    )
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    modules = [
        {int(row_id.split(":")[1]) % 12 for row_id in row_ids(stored, split)}
        for split in ("train", "validation")
    ]
    assert modules[0].isdisjoint(modules[1])
    assert all(modules)


def test_few_rows_still_give_one_to_validate_on(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "a.jsonl", [row_of(i) for i in range(3)]))
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts == {"train": 2, "validation": 1}


def test_explicit_validation_files_leave_the_training_rows_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [row_of(i) for i in range(100)])
    held_out = write(tmp_path / "dev.jsonl", [row_of(i) for i in range(100, 104)])
    source = source_of(train, validation=(held_out,), validation_fraction=0.5)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.counts == {"train": 100, "validation": 4}
    assert row_ids(stored, "validation") == [f"dev.jsonl:{line}" for line in range(1, 5)]


def test_few_malformed_rows_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forbid_writing: Any
) -> None:
    rows = [row_of(i) for i in range(98)] + ['{"question": ', {"question": "Why?"}]
    source = source_of(write(tmp_path / "train.jsonl", rows), validation_fraction=0.0)
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
    rows = [row_of(i) for i in range(97)] + [{"question": "Why?"}] * 3
    source = source_of(write(tmp_path / "train.jsonl", rows))
    with pytest.raises(MalformedRowsError, match=r"3 of 100 rows are malformed \(3\.0%") as caught:
        store_demonstrations(source, data_dir=tmp_path / "store")
    said = str(caught.value)
    assert "train.jsonl:98: no field 'answer'; the row has 'question' (and 2 more like it)" in said
    assert said.count("no field") == 1, "a reason is given once"
    assert "read as data.format fields" in said
    assert not (tmp_path / "store").exists()


def test_a_source_without_a_dialogue_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MalformedRowsError, match=r"data.train: .*empty.jsonl has no rows$"):
        store_demonstrations(source_of(str(tmp_path / "empty.jsonl")), data_dir=tmp_path / "store")


def test_trimmed_turns_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"from": role, "value": "x"} for role in ("gpt", "human", "gpt", "human")]
    train = write(tmp_path / "train.jsonl", [{"conversations": turns}])
    source = DemonstrationSource((train,), row_format="sharegpt", validation_fraction=0.0)
    stored = store_demonstrations(source, data_dir=tmp_path / "store")
    assert stored.trimmed_count == 1
    assert "1 dialogues begin with an assistant's turn or end with a user's" in caplog.text


def test_the_same_file_twice_is_another_dataset_and_its_repeated_rows_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, forbid_writing: Any
) -> None:
    train = write(tmp_path / "train.jsonl", [row_of(i) for i in range(5)])
    once = store_demonstrations(source_of(train), data_dir=tmp_path / "store")
    assert (once.repeated_count, caplog.text) == (0, "")
    twice = store_demonstrations(source_of(train, train), data_dir=tmp_path / "store")
    assert twice.fingerprint != once.fingerprint
    assert sum(twice.counts.values()) == 10
    assert twice.repeated_count == 5
    said = "5 rows of data.train repeat the dialogue of an earlier one"
    assert said in caplog.text
    caplog.clear()
    forbid_writing()
    assert store_demonstrations(source_of(train, train), data_dir=tmp_path / "store") == twice
    assert said in caplog.text, "said on every run"


def test_what_is_trained_on_cannot_be_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row_of(i) for i in range(5)]
    train, other = (
        write(tmp_path / "a.jsonl", rows),
        write(tmp_path / "b.jsonl", [row_of(9)]),
    )
    copy = write(tmp_path / "copy.jsonl", rows)
    for options, named in (
        ({"validation": (other, train)}, "data.validation is also trained on"),
        ({"validation": (copy,)}, "the same as .*copy.jsonl, byte for byte"),
        ({"test": (train,)}, "data.test is also trained on"),
    ):
        with pytest.raises(SourceError, match=named):
            store_demonstrations(source_of(train, **options), data_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    part = write(tmp_path / "part.jsonl", [row_of(7), row_of(2, more="fields"), row_of(3)])
    stored = store_demonstrations(source_of(train, validation=(part,)), data_dir=tmp_path / "store")
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
        train = write(tmp_path / f"{weight}" / "train.jsonl", rows(weight))
        source = DemonstrationSource((train,), validation_fraction=0.3)
        stored = store_demonstrations(source, data_dir=tmp_path / "store")
        turns = stored.open("train")[0].messages
        assert [turn.weight for turn in turns] == [1, weight, 1, 1]
        found.append((stored.counts, row_ids(stored, "validation")))
        assert stored.fingerprint.endswith("/weights") == (weight == 0)
        assert stored.unweighted_count == (40 if weight == 0 else 0)
    assert found[0] == found[1]


@pytest.mark.slow
def test_gsm8k_reads_whole(gsm8k_dir: Path, tmp_path: Path) -> None:
    source = source_of(str(gsm8k_dir / "train.jsonl"), validation=(str(gsm8k_dir / "test.jsonl"),))
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
