"""The running text that a vocabulary map is built from.

In: files of plain text, JSON or JSON lines. Out: a list of texts, none longer than a limit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from ivl_jax.json_files import read_json_items, read_json_lines
from ivl_jax.text_files import MalformedFileError, read_text

# Dynamic time warping holds one float64 per pair of tokens, and a token has at least one byte:
# 4,096² × 8 bytes = 134 MB at worst, 8 MB for ordinary English.
MAX_TEXT_BYTES = 4096


class TextFileError(ValueError):
    """A text file without usable text: which file, which line, what was expected."""


def read_texts(
    paths: Sequence[epath.PathLike], *, max_bytes: int = MAX_TEXT_BYTES
) -> tuple[list[str], int]:
    """Read texts from files.

    Args:
        paths: `.jsonl` (one row per line), `.json` (a list of rows), anything else plain text in
            UTF-8. A row is a string, a dialogue (`messages` or `conversations`), or an object whose
            string fields are joined by line breaks, in order.
        max_bytes: a longer text is split into pieces of at most this many UTF-8 bytes: after a line
            end, else before a space, else between two characters.

    Returns:
        The texts, and how many of them had to be split.

    Raises:
        TextFileError: no such file, an empty file, bytes that are not UTF-8, invalid JSON, or a row
            without text (the message names file and line).
    """
    texts, cut = [], 0
    for path in map(epath.Path, paths):
        for text in _file_texts(path):
            pieces = list(_pieces(text, max_bytes))
            cut += len(pieces) > 1
            texts += pieces
    return texts, cut


def _file_texts(path: epath.Path) -> list[str]:
    if not path.is_file():
        raise TextFileError(f"no text file at {path}")
    try:
        texts = list(_rows_or_text(path))
    except MalformedFileError as error:
        raise TextFileError(f"{error}; expected plain text, .json or .jsonl") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TextFileError(
            f"{path} has no text; provide the kind of text that the models will read, such as the "
            "demonstrations"
        )
    return texts


def _rows_or_text(path: epath.Path) -> Iterator[str]:
    if path.suffix not in (".json", ".jsonl"):
        yield read_text(path)
        return
    for row in read_json_lines(path) if path.suffix == ".jsonl" else read_json_items(path):
        if row.error is not None:
            raise row.error
        yield _row_text(row.value, f"{path}, line {row.number}")


def _row_text(row: Any, where: str) -> str:
    """The text of one row: a string, a dialogue's turns, or all string fields."""
    parts: list[Any] = []
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        turns = row.get("messages", row.get("conversations"))
        if isinstance(turns, list):
            parts = [
                turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)
            ]
        else:
            parts = list(row.values())
    texts = [part for part in parts if isinstance(part, str)]
    if not texts:
        found = f"fields {', '.join(row)}" if isinstance(row, Mapping) and row else _kind(row)
        raise TextFileError(
            f"{where} has no text; expected a string, an object with string fields, or a "
            f"dialogue (messages or conversations), got {found}"
        )
    return "\n".join(texts)


def _kind(value: Any) -> str:
    return "an empty object" if value == {} else type(value).__name__


def _pieces(text: str, max_bytes: int) -> Iterator[str]:
    """The text itself, or consecutive pieces of it that fit the limit."""
    content = text.encode("utf-8", errors="replace")
    start = 0
    while len(content) - start > max_bytes:
        end = _cut(content, start, start + max_bytes)
        yield content[start:end].decode("utf-8")
        start = end
    yield content[start:].decode("utf-8")


def _cut(content: bytes, start: int, limit: int) -> int:
    """Where to end a piece that begins at `start` and may reach `limit`."""
    line_end = content.rfind(b"\n", start, limit) + 1
    if line_end > start:
        return line_end
    space = content.rfind(b" ", start + 1, limit)
    if space > start:
        return space
    while content[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return limit
