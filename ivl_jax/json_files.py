"""Reads and writes JSON files: the one reader for all of the project's JSON.

In: a path, local or a URL that `etils.epath` reads. Out: the value; or a `MalformedFileError` that
names file, line and column, for bytes that are not UTF-8, text that is not JSON, content after the
value, excessively long integers or deep nesting, and a key that appears twice in an object with
different values. `NaN` and `Infinity` are accepted, as in Python: callers check for finite numbers.

How to use it:

    record = read_json_object(folder / "ivl.json")       # a whole file; a list is an error
    for line in read_json_lines(path):                   # .jsonl, line by line, errors included
        if line.error is not None: problems.append(str(line.error))
    for line in read_json_items(path):                   # a large .json list, item by item
    write_json(folder / "ivl.json", record)              # durable: either the old file or the new

A missing file is a `FileNotFoundError`. `MalformedFileError` is a `ValueError`; callers add the
remedy: `raise ValueError(f"{error}; delete the file") from error`.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from ivl_jax.paths import write_atomically
from ivl_jax.text_files import MalformedFileError, decode_text, read_text

MAX_DEPTH = 100  # Python's own parser fails near 1,000, and code that walks the value earlier

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = r'"(?:[^"\\]++|\\.)*+"'
_BUT_BRACKETS = re.compile(rf"{_STRING}|[^\[\]{{}}\"]+", re.DOTALL)
_STRING_OR_TOKEN = re.compile(rf"{_STRING}|[\[\]{{}}]|[0-9]+", re.DOTALL)
_ONE_KIND = str.maketrans("{}", "[]")


class JsonLine(NamedTuple):
    """One line of a JSON-lines file, or one item of a list."""

    number: int  # the line where it begins, from 1
    value: Any  # None where there is an error
    error: MalformedFileError | None  # why the line could not be read


class _RepeatedKeyError(ValueError):
    """An object in which a key appears twice, with different values."""


def read_json(path: epath.PathLike) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its value.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: It cannot be read, or is not exactly one JSON value.
    """
    return parse_json(read_text(path), path)


def read_json_object(path: epath.PathLike) -> dict[str, Any]:
    """Read a JSON file that must contain an object.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: As `read_json`; or the file contains something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise MalformedFileError(path, f"expected an object, got {json_kind(value)}")
    return value


def read_json_list(path: epath.PathLike) -> list[Any]:
    """Read a JSON file that must contain a list.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: As `read_json`; or the file contains something else.
    """
    value = read_json(path)
    if not isinstance(value, list):
        raise MalformedFileError(path, f"expected a list, got {json_kind(value)}")
    return value


def parse_json(content: str | bytes, name: epath.PathLike, *, first_line: int = 1) -> Any:
    r"""Parse JSON that is not a whole file.

    Args:
        content: The text, or its UTF-8 bytes.
        name: What to call it in an error.
        first_line: The line on which it begins.

    Returns:
        Its value.

    Raises:
        MalformedFileError: As `read_json`.

    Example:
        >>> parse_json('{"a": 1}\n]', "settings.json")
        Traceback (most recent call last):
        ...
        ivl_jax.text_files.MalformedFileError: settings.json, line 2, column 1: not JSON: content
        after the value
    """
    text = decode_text(content, name) if isinstance(content, bytes) else content
    start = _skip(text, 0)
    value, end = _decode(text, start, name, first_line)
    end = _skip(text, end)
    if end < len(text):
        raise _error_at(text, end, name, first_line, "not JSON: content after the value")
    return value


def read_json_lines(path: epath.PathLike) -> Iterator[JsonLine]:
    """Read a JSON-lines file; blank lines are skipped.

    Args:
        path: The file.

    Yields:
        Every line, with its value or with the error that names file, line and column.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: The operating system cannot read it.
    """
    try:
        with epath.Path(path).open("rb") as file:
            first_byte = 0
            for number, content in enumerate(file, start=1):
                try:
                    text = decode_text(content, path, first_byte=first_byte, line=number).rstrip()
                    if text:
                        value = parse_json(text, path, first_line=number)
                        yield JsonLine(number, value, None)
                except MalformedFileError as error:
                    yield JsonLine(number, None, error)
                first_byte += len(content)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MalformedFileError(path, f"cannot be read: {error.strerror or error}") from error


def read_json_items(path: epath.PathLike) -> Iterator[JsonLine]:
    """Read a JSON file that contains a list, item by item, so that each item's line is known.

    Args:
        path: The file.

    Yields:
        Every item; none has an error.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: It is not one JSON list; raised when the faulty place is reached.
    """
    text = read_text(path)
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise _error_at(text, position, path, 1, "expected a list")
    line = 1 + text.count("\n", 0, position)
    before, position = position, _skip(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        line += text.count("\n", before, position)
        value, end = _decode(text, position, path, 1)
        yield JsonLine(line, value, None)
        before, position = position, _skip(text, end)
        if text[position : position + 1] not in (",", "]"):
            reason = "not JSON: expected ',' or ']' after an item of the list"
            raise _error_at(text, position, path, 1, reason)
        closed = text[position] == "]"
        if not closed:
            position = _skip(text, position + 1)
    end = _skip(text, position + 1)
    if end < len(text):
        raise _error_at(text, end, path, 1, "not JSON: content after the list")


def write_json(path: epath.PathLike, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file durably: at every moment it has either the old content or the new.

    Args:
        path: The file; its folder must exist.
        value: What `json.dumps` takes.
        indent: Spaces of each level; None writes one line.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    # A lone surrogate has no UTF-8 encoding; this error handler escapes it as JSON does.
    write_atomically(path, text.encode(errors="backslashreplace"))


def json_kind(value: Any) -> str:
    """What JSON calls a value: "an object", "a list", "text", "null", …."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; an error where a key has two values."""
    record = dict(pairs)
    if len(record) != len(pairs):
        for key, value in pairs:
            if record[key] != value:
                raise _RepeatedKeyError(key)
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _decode(text: str, start: int, path: epath.PathLike, first_line: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if start == len(text):
            raise _error_at(text, start, path, first_line, "not JSON: it is empty") from error
        reason = f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}"
        raise _error_at(text, error.pos, path, first_line, reason) from error
    except _RepeatedKeyError as error:
        reason = f"the key {str(error)!r} appears twice in one object, with different values"
        where = _second_place(text, start, str(error))
        raise _error_at(text, where, path, first_line, reason) from error
    except RecursionError as error:
        raise _too_deep(text, start, path, first_line) from error
    except ValueError as error:  # an integer with more digits than Python converts
        limit = sys.get_int_max_str_digits()
        where = next((m.start() for m in _outside(text, start) if len(m[0]) > limit), start)
        reason = f"an integer of more than {limit} digits"
        raise _error_at(text, where, path, first_line, reason) from error
    if _is_deep(text, start, end):
        raise _too_deep(text, start, path, first_line)
    return value, end


def _is_deep(text: str, start: int, end: int) -> bool:
    """Whether a value that could be parsed is nested deeper than `MAX_DEPTH`."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False
    brackets = _BUT_BRACKETS.sub("", text[start:end]).translate(_ONE_KIND)
    for _ in range(MAX_DEPTH):  # each pass removes the innermost level
        brackets = brackets.replace("[]", "")
        if not brackets:
            return False
    return True


def _second_place(text: str, start: int, key: str) -> int:
    """Where a key appears for the second time in one object."""
    seen: list[set[str]] = []
    for match in _STRING_OR_TOKEN.finditer(text, start):
        if match[0] in ("{", "["):
            seen.append(set())
        elif match[0] in ("}", "]"):
            seen.pop()
        elif match[0][0] == '"' and text.startswith(":", _skip(text, match.end())):
            found = json.loads(match[0])
            if found == key and found in seen[-1]:
                return match.start()
            seen[-1].add(found)
    return start


def _outside(text: str, start: int) -> Iterator[re.Match[str]]:
    """Brackets and digits from `start` on that are not inside a string."""
    return (match for match in _STRING_OR_TOKEN.finditer(text, start) if match[0][0] != '"')


def _too_deep(text: str, start: int, path: epath.PathLike, first_line: int) -> MalformedFileError:
    where, depth = start, 0
    for match in _outside(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            where = match.start()
            break
    reason = f"nested too deeply: more than {MAX_DEPTH} lists and objects inside each other"
    return _error_at(text, where, path, first_line, reason)


def _error_at(
    text: str, position: int, path: epath.PathLike, first_line: int, reason: str
) -> MalformedFileError:
    line = first_line + text.count("\n", 0, position)
    column = position - text.rfind("\n", 0, position)
    return MalformedFileError(path, reason, line=line, column=column)


def _skip(text: str, position: int) -> int:
    """The position after any white space."""
    match = _SPACE.match(text, position)
    return position if match is None else match.end()
