"""Reads the raw rows of demonstration files and of TFDS datasets.

In: a path to a JSON or JSONL file, or `tfds:NAME[/CONFIG[:VERSION]][:SPLIT]`. Out: rows with their
place, and a hash of the content.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from ivl_jax.data import catalogue
from ivl_jax.data.formats import RowError, SourceError
from ivl_jax.json_files import read_json_items, read_json_lines
from ivl_jax.paths import usable_path
from ivl_jax.text_files import MalformedFileError

_HASH_CHUNK = 1 << 20  # bytes


class RawRow(NamedTuple):
    """One row, or why it could not be read."""

    place: str  # "train.jsonl:17": file, line; or "tfds:gsm8k:train:17": dataset, split, index
    value: Any  # the value from JSON or TFDS, or a RowError


def is_tfds(reference: str) -> bool:
    """Whether a source is a TFDS dataset rather than a file."""
    return reference.startswith("tfds:")


def read_rows(reference: str) -> Iterator[RawRow]:
    """Reads a source row by row, in its own order.

    Args:
        reference: `.jsonl`: one row per line, blank lines skipped. `.json`: a list of rows, or one
            row per line. `tfds:…`: a dataset of the TFDS catalogue, or a folder with a prepared
            one; without a split, `train`.

    Yields:
        Every row; one that is not JSON has a RowError as its value.

    Raises:
        SourceError: The source is missing, or a list of rows is malformed in the middle.
    """
    if is_tfds(reference):
        return (RawRow(place, value) for place, value in catalogue.read_rows(reference))
    return _read_json_file(_existing(reference))


def hash_source(reference: str) -> str:
    """Returns the SHA-256 of a source's bytes: the file's, or those of the TFDS split's files.

    Raises:
        SourceError: The source is missing.
    """
    digest = hashlib.sha256()
    if is_tfds(reference):
        split, paths = catalogue.split_files(reference)
        digest.update(split.encode())
    else:
        paths = [_existing(reference)]
    for path in sorted(paths):
        try:
            with path.open("rb") as file:
                while chunk := file.read(_HASH_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise SourceError(f"demonstrations: {path} cannot be read: {error}") from error
    return digest.hexdigest()


def _existing(reference: str) -> epath.Path:
    path = usable_path(reference)
    if not path.exists():
        raise SourceError(f"demonstrations: no file {reference}")
    if path.is_dir():
        raise SourceError(f"demonstrations: {reference} is a folder, expected a JSON or JSONL file")
    return path


def _first_byte(path: epath.Path) -> bytes:
    """The first byte that is not white space or a byte-order mark."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_json_file(path: epath.Path) -> Iterator[RawRow]:
    """A list of rows, or one row per line."""
    is_list = path.suffix == ".json" and _first_byte(path) == b"["
    try:
        for line in read_json_items(path) if is_list else read_json_lines(path):
            value = line.value if line.error is None else _row_error(line.error)
            yield RawRow(f"{path.name}:{line.number}", value)
    except MalformedFileError as error:
        raise SourceError(f"demonstrations: {error}") from error


def _row_error(error: MalformedFileError) -> RowError:
    """What is wrong with a row; its place names file and line."""
    column = "" if error.column is None else f" (column {error.column})"
    return RowError(error.reason + column)
