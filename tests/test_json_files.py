"""Whatever a JSON file holds, its value is read or the error names file, line and column."""

import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.json_files import (
    MAX_DEPTH,
    parse_json,
    read_json,
    read_json_items,
    read_json_lines,
    read_json_list,
    read_json_object,
    write_json,
)
from ivl_jax.text_files import MalformedFileError

HUGE = "9" * (sys.get_int_max_str_digits() + 1)


def _file(folder: Path, content: str | bytes, name: str = "a.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _message(read: Callable[[Path], Any], path: Path) -> str | None:
    """What a reader says about a file; None where it reads it."""
    try:
        read(path)
    except MalformedFileError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ('{"a": 1,\n "b" 2}', "line 2, column 6", "not JSON: expecting ':' delimiter"),
        ('{"a": 1}\n[2]', "line 2, column 1", "content after the value"),
        ("", "line 1, column 1", "it is empty"),
        (" \n ", "line 2, column 2", "it is empty"),
        ('["é", x]', "line 1, column 7", "not JSON: expecting value"),
        (b'{"a": "caf\xe9"}', "line 1", r"byte 10: not UTF-8 \(found 0xe9\)"),
        (b'{\n"\xc3\xa9": "\xff"}', "line 2", "byte 9: not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "line 1", "byte 0: not UTF-8 .it begins as UTF-16 does"),
        (f'{{"{HUGE}": 1,\n"a": {HUGE}}}', "line 2, column 6", "an integer of more than 4300"),
        ("[" * 101 + "]" * 101, "line 1, column 101", "nested too deeply: more than 100"),
        ('{"a":' * 101 + "1" + "}" * 101, "line 1, column 501", "nested too deeply"),
        ("[" * 100_000, "line 1, column 101", "nested too deeply"),
        ('{"a": 1,\n "a": 2}', "line 2, column 2", "the key 'a' appears twice in one object"),
        ('{"b": {"a": 1},\n "a": 2, "a": 3}', "line 2, column 10", "the key 'a' appears twice"),
    ],
)
def test_every_malformed_file_is_named_with_the_place(
    tmp_path: Path, content: str | bytes, place: str, reason: str
) -> None:
    path = _file(tmp_path, content)
    with pytest.raises(MalformedFileError, match=reason) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}, {place}: ")


def test_what_is_json_is_read_as_it_is(tmp_path: Path) -> None:
    value = {"é": [1, 2.5, None, True, "\n"], "b": {"[": "]" * 300}, "c": [{}] * 300}
    for indent in (None, 2):
        text = json.dumps(value, indent=indent)
        assert read_json(_file(tmp_path, text)) == value
        assert read_json(_file(tmp_path, b"\xef\xbb\xbf" + text.encode())) == value
    assert read_json(_file(tmp_path, '{"a": 1, "a": 1}')) == {"a": 1}  # the same twice
    deepest: Any = read_json(_file(tmp_path, "[" * MAX_DEPTH + "]" * MAX_DEPTH))
    for _ in range(MAX_DEPTH - 1):
        (deepest,) = deepest
    assert deepest == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.json"))):
        read_json(tmp_path / "none.json")
    for read in (read_json, lambda path: list(read_json_lines(path))):
        with pytest.raises(MalformedFileError, match=re.escape(str(tmp_path))):
            read(tmp_path)


def test_another_kind_of_value_is_named(tmp_path: Path) -> None:
    assert read_json_object(_file(tmp_path, '{"a": 1}')) == {"a": 1}
    assert read_json_list(_file(tmp_path, "[1]")) == [1]
    with pytest.raises(MalformedFileError, match=r"a\.json: expected an object, got a list"):
        read_json_object(_file(tmp_path, "[1]"))
    with pytest.raises(MalformedFileError, match=r"a\.json: expected a list, got null"):
        read_json_list(_file(tmp_path, "null"))


def test_lines_are_read_one_by_one_and_a_bad_one_does_not_end_them(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"n": 1}\r\n\n \t\n{"n": 2\n{"n": "\xff"}\n"\xc2\x85\xe2\x80\xa8" \n[3] [4]'
    )
    lines = list(read_json_lines(_file(tmp_path, content, "a.jsonl")))
    values = [(line.number, line.value) for line in lines]
    assert values == [(1, {"n": 1}), (4, None), (5, None), (6, "\x85\u2028"), (7, None)]
    errors = [str(line.error).partition("a.jsonl, ")[2] for line in lines if line.error]
    assert errors[0] == "line 4, column 8: not JSON: expecting ',' delimiter"
    where = content.index(b"\xff")
    assert errors[1] == f"line 5: byte {where}: not UTF-8 (found 0xff); save it as UTF-8"
    assert errors[2] == "line 7, column 5: not JSON: content after the value"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_item_by_item_with_each_line(tmp_path: Path, indent: int | None) -> None:
    values = [{"n": 1, "m": [1, 2]}, "two", {"n": 3}]
    items = list(read_json_items(_file(tmp_path, "\n" + json.dumps(values, indent=indent) + "\n ")))
    assert [item.value for item in items] == values
    expected = [2, 2, 2] if indent is None else [3, 10, 11]
    assert [item.number for item in items] == expected
    assert list(read_json_items(_file(tmp_path, "[ ]"))) == []


@pytest.mark.parametrize(
    ("content", "read", "place", "reason"),
    [
        ("[1]\n[2, 3]", 1, "line 2, column 1", "content after the list"),
        ("[1 2]", 1, "line 1, column 4", "expected ',' or ']' after an item"),
        ("[1,,2]", 1, "line 1, column 4", "not JSON: expecting value"),
        ("[1,]", 1, "line 1, column 4", "not JSON: expecting value"),
        ("[1,\n2", 2, "line 2, column 2", "expected ',' or ']'"),
        ("[1,\n", 1, "line 2, column 1", "it is empty"),
        ('{"a": 1}', 0, "line 1, column 1", "expected a list"),
        (f"[1, {HUGE}]", 1, "line 1, column 5", "an integer of more than"),
    ],
)
def test_a_list_is_broken_where_it_is_broken(
    tmp_path: Path, content: str, read: int, place: str, reason: str
) -> None:
    items = read_json_items(_file(tmp_path, content))
    for _ in range(read):
        next(items)
    with pytest.raises(MalformedFileError, match=f"{place}: .*{re.escape(reason)}"):
        next(items)


def test_what_is_written_is_read_back_and_replaces_the_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    value = {"é": "half a pair: \ud83e", "n": [1, None]}
    write_json(path, value)
    assert read_json(path) == value
    assert "é" in path.read_text(encoding="utf-8")
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(file), fsync(file))[1])
    write_json(path, [1])
    assert len(flushed) == 2  # the file and its folder

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, [2])
    assert read_json(path) == [1]
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_any_damage_gives_a_value_or_a_named_error(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = json.dumps([{"a": [1, {"b": "é\n"}], "c": -1.5e3}, None, "x"], indent=1).encode()
    for _ in range(int(os.environ.get("IVL_FUZZ", "300"))):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(content) + 1)
            piece = draw.choice([b"", b"[" * 200, b"\xff", b"9" * 5000, b'"', b",", b"\n", b"{"])
            content[place : place + draw.randint(0, 3)] = piece
        path = _file(tmp_path, bytes(content))
        for read in (read_json, lambda p: list(read_json_items(p))):
            message = _message(read, path)
            assert message is None or message.startswith(f"{path}, line ")
            assert "\n" not in (message or "")
        for line in read_json_lines(path):
            assert line.error is None or str(line.error).startswith(f"{path}, line {line.number}")


def test_text_that_is_not_from_a_file_is_named_as_told() -> None:
    assert parse_json(b"[1]", "header of x") == [1]
    with pytest.raises(MalformedFileError, match="header of x, line 7, column 2: not JSON"):
        parse_json("[", "header of x", first_line=7)
