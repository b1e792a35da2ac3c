"""Reads the raw rows of demonstration files and of TFDS catalogue sets.

In: a path to a JSON or JSONL file, or `tfds:NAME[/CONFIG[:VERSION]][:SPLIT]`. Out: rows with the
place they stand at, and a hash of the content.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ivl_jax.data.formats import RowError

_TFDS = re.compile(
    r"tfds:(?P<name>.+?)(?P<version>:\d+(?:\.[\d*]+)+)?(?::(?P<split>[A-Za-z_]\w*(?:\[.*\])?))?"
)
_HASH_CHUNK = 1 << 20  # bytes


class RawRow(NamedTuple):
    """One row, or why it could not be read."""

    place: str  # "train.jsonl:17": file and line, or "tfds:gsm8k:train:17": set, split and index
    value: Any  # what JSON or TFDS gives, or a RowError


class SourceError(ValueError):
    """A source that cannot be read at all."""


def is_tfds(reference: str) -> bool:
    """Whether a source is a TFDS set rather than a file."""
    return reference.startswith("tfds:")


def read_rows(reference: str) -> Iterator[RawRow]:
    """Reads a source row by row, in its own order.

    Args:
        reference: `.jsonl`: one row a line, blank lines skipped. `.json`: a list of rows, or one
            row a line. `tfds:…`: a set of the TFDS catalogue, or a folder that holds a prepared
            one; without a split, `train`.

    Yields:
        Every row; one that is not JSON has a RowError as its value.

    Raises:
        SourceError: The source is absent, or a list of rows is broken in the middle.
    """
    if is_tfds(reference):
        return _read_tfds(reference)
    path = _existing(reference)
    if path.suffix == ".json" and _first_byte(path) == b"[":
        return _read_json_list(path)
    return _read_json_lines(path)


def hash_source(reference: str) -> str:
    """Returns the SHA-256 of a source's bytes: the file's, or those of the TFDS split's files.

    Raises:
        SourceError: The source is absent.
    """
    digest = hashlib.sha256()
    if is_tfds(reference):
        builder, split = _open_tfds(reference)
        paths = [epath.Path(path) for path in builder.info.splits[split.split("[")[0]].filepaths]
        digest.update(split.encode())
    else:
        paths = [_existing(reference)]
    for path in sorted(paths):
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _existing(reference: str) -> epath.Path:
    path = epath.Path(reference).expanduser()
    if not path.exists():
        raise SourceError(f"demonstrations: no file {reference}")
    if path.is_dir():
        raise SourceError(f"demonstrations: {reference} is a folder, expected a JSON or JSONL file")
    return path


def _first_byte(path: epath.Path) -> bytes:
    """The first byte that is not white space or a byte-order mark."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_json_lines(path: epath.Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                value: Any = json.loads(text)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                value = RowError(f"not JSON: {error}")
            yield RawRow(f"{path.name}:{number}", value)


def _read_json_list(path: epath.Path) -> Iterator[RawRow]:
    """A list of rows, decoded one at a time so that each row's line is known."""
    text = path.read_bytes().decode("utf-8-sig")
    decoder = json.JSONDecoder()
    skip = re.compile(r"[\s,]*")
    position = text.index("[") + 1
    line = 1 + text.count("\n", 0, position)
    while True:
        start = skip.match(text, position).end()  # type: ignore[union-attr] - matches everywhere
        line += text.count("\n", position, start)
        if text[start : start + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise SourceError(
                f"{path}, line {error.lineno}: the list of rows is not JSON here: {error.msg}"
            ) from error
        yield RawRow(f"{path.name}:{line}", value)
        line += text.count("\n", start, end)
        position = end


def _open_tfds(reference: str) -> tuple[Any, str]:
    """The TFDS builder, its set prepared, and the split."""
    import tensorflow_datasets as tfds

    match = _TFDS.fullmatch(reference)
    if match is None:
        raise SourceError(f"{reference}: expected tfds:NAME[/CONFIG[:VERSION]][:SPLIT]")
    name, split = match["name"] + (match["version"] or ""), match["split"] or "train"
    try:
        if (epath.Path(match["name"]) / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(match["name"])
        else:
            builder = tfds.builder(name)
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise SourceError(
            f"{reference}: TFDS cannot provide this set: {error}; prepare it once where it can be "
            'downloaded, with download_and_prepare(file_format="array_record"), and name its '
            "folder: tfds:/path/to/NAME/VERSION"
        ) from error
    if split.split("[")[0] not in builder.info.splits:
        raise SourceError(f"{reference}: no split {split!r}; it has {sorted(builder.info.splits)}")
    return builder, split


def _read_tfds(reference: str) -> Iterator[RawRow]:
    builder, split = _open_tfds(reference)
    try:
        rows = builder.as_data_source(split)
    except NotImplementedError as error:
        raise SourceError(
            f"{reference}: stored as {builder.info.file_format.value}, expected array_record: "
            'prepare it again elsewhere with download_and_prepare(file_format="array_record")'
        ) from error
    for index in range(len(rows)):
        try:
            value = _plain(rows[index])
        except UnicodeDecodeError as error:
            value = RowError(f"not UTF-8: {error}")
        yield RawRow(f"tfds:{builder.name}:{split}:{index}", value)


def _plain(value: Any) -> Any:
    """A TFDS example as JSON would hold it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
