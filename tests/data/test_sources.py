"""Rows come with the line they stand on; broken files are named."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from ivl_jax.data.formats import RowError
from ivl_jax.data.sources import SourceError, hash_source, read_rows


class IvlTestSums(tfds.core.GeneratorBasedBuilder):
    """A set of the TFDS catalogue for the tests."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        features = {"question": text, "total": tfds.features.Scalar(np.int64), "messages": turns}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for number in range(count):
            question = f"{number} + ü?"
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": str(number)},
            ]
            yield number, {"question": question, "total": number, "messages": turns}


@pytest.fixture
def catalogue_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where TFDS keeps catalogue sets."""
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    return tmp_path


def _rows(path: Path) -> list[tuple[str, Any]]:
    return [(row.place, row.value) for row in read_rows(str(path))]


def test_json_lines_keep_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\n  \n{"n": "\xc3\xbc"}\n[3]')
    assert _rows(path) == [("a.jsonl:1", {"n": 1}), ("a.jsonl:4", {"n": "ü"}), ("a.jsonl:5", [3])]


def test_a_line_that_is_not_json_is_a_row_error_and_reading_continues(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1\n{"n": "\xff"}\n{"n": 3}\n')
    (_, first), (place, second), last = _rows(path)
    assert isinstance(first, RowError)
    assert "not JSON" in str(first)
    assert isinstance(second, RowError)
    assert place == "a.jsonl:2"
    assert last == ("a.jsonl:3", {"n": 3})


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_keeps_line_numbers(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    values = [{"n": 1, "m": [1, 2]}, "two", {"n": 3}]
    path.write_text(json.dumps(values, indent=indent))
    found = _rows(path)
    assert [value for _, value in found] == values
    lines = [f"a.json:{line}" for line in ((1, 1, 1) if indent is None else (2, 9, 10))]
    assert [place for place, _ in found] == lines


def test_json_lines_in_a_json_file_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert _rows(path) == [("a.json:1", {"n": 1}), ("a.json:2", {"n": 2})]


def test_a_json_list_broken_in_the_middle_stops_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"n": 1},\n{"n": 2},\n{"n" 3}]')
    with pytest.raises(SourceError, match="line 3"):
        _rows(path)


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        (
            b'[{"n": 1}]\n[{"n": 2}]',
            1,
            "a.json, line 2, column 1: not JSON: content after the list",
        ),
        (b'[{"n": 1} {"n": 2},,,{"n": 3}', 1, "a.json, line 1, column 11: not JSON: expected ','"),
        (b'[{"n": 1},\n{"n": 2}', 2, "a.json, line 2, column 9: not JSON: expected ',' or"),
        (b'[{"n": "caf\xe9"}]', 0, "a.json, line 1: byte 11: not UTF-8 (found 0xe9)"),
        ('[{"n": 1}]'.encode("utf-16-le"), 0, "a.json, line 1, column 2: not JSON"),
        (b'[{"n": 1}, {"n": ' + b"9" * 5000 + b"}]", 1, "column 18: an integer of more than 4300"),
        (b'[{"n": 1}, {"n": ' + b"[" * 5000, 1, "column 117: nested too deeply"),
    ],
)
def test_nothing_of_a_broken_list_is_dropped_in_silence(
    tmp_path: Path, content: bytes, read: int, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    rows = read_rows(str(path))
    assert [next(rows).value for _ in range(read)] == [{"n": 1}, {"n": 2}][:read]
    with pytest.raises(SourceError, match=re.escape(message)):
        next(rows)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits (column 7)"),
        (b'{"n": ' + b"[" * 100_000, "nested too deeply: more than 100 lists and objects"),
        (b'{"n": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply"),
        (b'{"n": "caf\xe9"}', "byte 19: not UTF-8 (found 0xe9); save it as UTF-8"),
        (b'{"n": 1} {"n": 2}', "not JSON: content after the value (column 10)"),
        (b'{"n": 1, "n": 2}', "the key 'n' appears twice in one object, with different values"),
    ],
)
def test_a_row_beyond_any_use_is_a_row_error_with_its_line(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    first, (place, error), last = _rows(path)
    assert (first, last) == (("a.jsonl:1", {"n": 1}), ("a.jsonl:3", {"n": 3}))
    assert place == "a.jsonl:2"
    assert isinstance(error, RowError)
    assert reason in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_an_absent_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="demonstrations: "):
        hash_source(str(tmp_path / name))


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("{}")
    second.write_text("{}")
    assert hash_source(str(first)) == hash_source(str(second))
    second.write_text("{ }")
    assert hash_source(str(first)) != hash_source(str(second))


def test_a_catalogue_set_is_prepared_and_read_as_json_would_be(catalogue_dir: Path) -> None:
    rows = list(read_rows("tfds:ivl_test_sums:test"))
    turns = {"role": ["user", "assistant"], "content": ["1 + ü?", "1"]}
    assert rows[1].value == {"question": "1 + ü?", "total": 1, "messages": turns}
    assert rows[1].place == "tfds:ivl_test_sums:test:1"
    assert len(rows) == 2
    assert len(list(read_rows("tfds:ivl_test_sums"))) == 6
    assert len(list(read_rows("tfds:ivl_test_sums:1.2.0:train[:50%]"))) == 3
    assert hash_source("tfds:ivl_test_sums:test") == hash_source("tfds:ivl_test_sums:test")
    assert hash_source("tfds:ivl_test_sums:test") != hash_source("tfds:ivl_test_sums:train")
    assert hash_source("tfds:ivl_test_sums:train[:3]") != hash_source("tfds:ivl_test_sums:train")
    folder = catalogue_dir / "ivl_test_sums" / "1.2.0"
    by_folder = list(read_rows(f"tfds:{folder}:test"))
    assert [row.value for row in by_folder] == [row.value for row in rows]


def test_an_unknown_set_or_split_is_named(catalogue_dir: Path) -> None:
    del catalogue_dir
    with pytest.raises(SourceError, match="TFDS cannot provide this dataset"):
        hash_source("tfds:ivl_no_such_set")
    with pytest.raises(SourceError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        hash_source("tfds:ivl_test_sums:dev")


def _foreign(folder: Path, change: Callable[[Any], Any]) -> None:
    """Changes the description of a prepared set."""
    path = folder / "features.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _legacy(features: Any) -> Any:
    inside = {"question": {"type": "ivl_evil.code.Text", "content": {}}}
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    return {"type": kind, "content": inside}


def _nested_json(features: Any) -> Any:
    inside = json.dumps({"question": {"type": "ivl_evil.code.Text", "content": {}}})
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    return {"pythonClassName": kind, "jsonFeature": {"json": inside}}


def _deep_field(features: Any) -> Any:
    text = features["featuresDict"]["features"]["question"]
    text["pythonClassName"] = "ivl_evil.code.Text"
    return features


@pytest.mark.parametrize("change", [_legacy, _nested_json, _deep_field])
def test_a_set_that_names_foreign_classes_is_refused_before_they_are_imported(
    catalogue_dir: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    list(read_rows("tfds:ivl_test_sums:test"))  # prepares it
    folder = catalogue_dir / "ivl_test_sums" / "1.2.0"
    package = catalogue_dir / "ivl_evil"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "code.py").write_text(f"open({str(catalogue_dir / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(catalogue_dir)
    _foreign(folder, change)
    shutil.copytree(folder, catalogue_dir / "ivl_elsewhere" / "1.2.0")
    for reference in (
        f"tfds:{folder}:test",
        "tfds:ivl_test_sums:1.2.0:test",
        "tfds:ivl_elsewhere:1.2.0:test",
    ):
        for read in (hash_source, lambda name: list(read_rows(name))):
            with pytest.raises(SourceError, match=r"features\.json names Python .*ivl_evil"):
                read(reference)
    assert not (catalogue_dir / "ran").exists()


def test_a_set_with_code_of_its_own_is_refused(catalogue_dir: Path) -> None:
    del catalogue_dir
    with pytest.raises(SourceError, match="run their own code"):
        hash_source("tfds:somebody:their_set:train")


def test_a_damaged_set_is_named(catalogue_dir: Path) -> None:
    list(read_rows("tfds:ivl_test_sums:test"))
    folder = catalogue_dir / "ivl_test_sums" / "1.2.0"
    (file,) = folder.glob("*test.array_record*")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    written = [place for place, byte in enumerate(whole) if byte]  # the rest is padding
    flipped[written[len(written) // 3]] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(SourceError, match="tfds:ivl_test_sums:test"):
            list(read_rows("tfds:ivl_test_sums:test"))
    for name in ("features.json", "dataset_info.json"):
        content = (folder / name).read_bytes()
        for damaged in (content[:-20], b"", b"\xff" + content):
            (folder / name).write_bytes(damaged)
            with pytest.raises(SourceError, match=re.escape(str(folder))):
                list(read_rows(f"tfds:{folder}:test"))
        (folder / name).write_bytes(content)
