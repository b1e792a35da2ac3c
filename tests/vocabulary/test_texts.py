"""Texts are read from every form a file has, and a file without text is an error that names it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_jax.vocabulary.texts import TextFileError, _pieces, read_texts


def _file(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_rows_give_all_string_fields_or_the_turns_of_a_dialogue(tmp_path: Path) -> None:
    rows = [
        {"question": "Q?", "id": 7, "answer": "A."},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"id": "x", "conversations": [{"from": "human", "value": "a\u2028b"}]},
        "just a string",
    ]
    expected = ["Q?\nA.", "hi\nho", "a\u2028b", "just a string"]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_texts([_file(tmp_path, "rows.jsonl", lines)]) == (expected, 0)
    listed = _file(tmp_path, "rows.json", json.dumps(rows))
    assert read_texts([listed]) == (expected, 0)
    plain = _file(tmp_path, "book.txt", "One.\n\nTwo.")
    assert read_texts([plain, listed])[0] == ["One.\n\nTwo.", *expected]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt has no text"),
        ("blank.txt", " \n\n", "blank.txt has no text"),
        ("empty.jsonl", "", "empty.jsonl has no text"),
        ("empty.json", "[]", "empty.json has no text"),
        ("blank.jsonl", '{"a": ""}', "blank.jsonl has no text"),
        ("bad.jsonl", '{"a": "b"}\n{"a": \n', "bad.jsonl, line 2, column .: not JSON"),
        ("bad.json", "{", "bad.json, line 1, column 1: expected a list"),
        ("object.json", '{"a": "b"}', "object.json, line 1, column 1: expected a list"),
        ("numbers.jsonl", '{"a": "b"}\n\n{"a": 1, "b": [2]}', "line 3 has no text.*fields a, b"),
        ("scalars.jsonl", "17", "line 1 has no text.*got int"),
        ("nothing.jsonl", "{}", "line 1 has no text.*got an empty object"),
        ("turns.jsonl", '{"messages": [{"role": "user"}]}', "has no text.*fields messages"),
    ],
)
def test_files_without_text_are_errors_that_name_file_and_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(TextFileError, match=message):
        read_texts([_file(tmp_path, name, content)])


def test_missing_and_binary_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TextFileError, match="no text file at"):
        read_texts([tmp_path / "none.txt"])
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(TextFileError, match=r"image.png, line 1: byte 0: not UTF-8"):
        read_texts([path])


def test_long_texts_are_cut_after_lines_else_before_spaces_and_counted(tmp_path: Path) -> None:
    path = _file(tmp_path, "long.txt", "first\nsecond third 123456789abc")
    assert read_texts([path], max_bytes=8) == (
        ["first\n", "second", " third", " 1234567", "89abc"],
        1,
    )


@given(st.text("a \né🙂"), st.integers(4, 9))
def test_pieces_are_the_text_and_fit(text: str, limit: int) -> None:
    pieces = list(_pieces(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= limit for piece in pieces)
    assert all(pieces) or not text
