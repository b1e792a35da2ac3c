"""Reads text files, and names the file and the place where one is malformed.

In: a path, local or a URL that `etils.epath` reads. Out: its text, or a `MalformedFileError`.
"""

import os
from typing import Any

from etils import epath

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class MalformedFileError(ValueError):
    """A file whose content cannot be read: the file, the place in it, and what is wrong there.

    Args:
        path: The file, or another name for it.
        reason: What is wrong, and what was expected.
        line: The line of the place, from 1.
        column: Its column, in characters from 1.

    Attributes:
        path: As given, a string.
        reason: As given.
        line: As given; None for the whole file.
        column: As given; None for the whole line.
    """

    def __init__(
        self,
        path: epath.PathLike,
        reason: str,
        *,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.line = line
        self.column = column
        places = [self.path]
        places += [] if line is None else [f"line {line}"]
        places += [] if column is None else [f"column {column}"]
        super().__init__(f"{', '.join(places)}: {reason}")


def shortened(value: Any, *, characters: int = 60) -> str:
    """A value from a file as shown in a message: its `repr`, cut off if it is long."""
    try:
        shown = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return "a number with thousands of digits"
    return shown if len(shown) <= characters else f"{shown[: characters - 1]}…"


def read_text(path: epath.PathLike) -> str:
    """Read a UTF-8 file; a byte-order mark at its beginning is dropped.

    Args:
        path: The file.

    Returns:
        Its text, line ends as they are in the file.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: It cannot be read or is not UTF-8.
    """
    return decode_text(read_bytes(path), path)


def read_bytes(path: epath.PathLike) -> bytes:
    """Read a file.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: It is a folder, or the operating system cannot read it.
    """
    try:
        return epath.Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MalformedFileError(path, f"cannot be read: {error.strerror or error}") from error


def decode_text(
    content: bytes, path: epath.PathLike, *, first_byte: int = 0, line: int | None = None
) -> str:
    """Decode UTF-8, with or without a byte-order mark.

    Args:
        content: The bytes of a file or of one of its lines.
        path: What to call the file in an error.
        first_byte: Where `content` begins in the file.
        line: Which line of the file it is, from 1; None for the whole file.

    Returns:
        The text.

    Raises:
        MalformedFileError: It is not UTF-8; names the byte, counted from the file's beginning.
    """
    begins = content.startswith(_BYTE_ORDER_MARK) and first_byte == 0
    start = len(_BYTE_ORDER_MARK) if begins else 0
    try:
        return content[start:].decode()
    except UnicodeDecodeError as error:
        where = start + error.start
        wide = first_byte == 0 and content[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "it begins as UTF-16 does" if wide else f"found 0x{content[where]:02x}"
        number = content.count(b"\n", 0, where) + (line or 1)
        raise MalformedFileError(
            path, f"byte {first_byte + where}: not UTF-8 ({kind}); save it as UTF-8", line=number
        ) from error
