"""A JSON-lines file whose records survive a crash of the process.

In: records. Out: one line each, durable on request, and a file that can be cut back to an earlier
size.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ivl_jax.paths import flush_folder, is_local, write_atomically


class RecordsError(ValueError):
    """Records that are missing: which file, how many bytes, remedy."""


class RecordFile:
    """A JSON-lines file that can be cut back; on an object store it is rewritten when flushed.

    Args:
        path: the file.
        ensure_ascii: whether other characters are written as escapes.
    """

    def __init__(self, path: epath.Path, *, ensure_ascii: bool = True) -> None:
        self.path = path
        self._ensure_ascii = ensure_ascii
        self._lines: list[bytes] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; on a local disk, it survives a kill of the process from then on.

        Raises:
            OSError: it cannot be written; names the file.
        """
        if jax.process_index() > 0:
            return
        line = json.dumps(record, ensure_ascii=self._ensure_ascii).encode() + b"\n"
        if is_local(self.path):
            try:
                with Path(self.path).open("ab") as file:
                    file.write(line)
            except OSError as error:
                # A failed write, for example on a full disk, does not name its file.
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            return
        if self._lines is None:
            self._lines = [self.path.read_bytes()] if self.path.exists() else []
        self._lines.append(line)

    def flush(self) -> int:
        """Make the records durable: from then on they survive a power failure.

        Returns:
            The size of the file, bytes.
        """
        if jax.process_index() > 0:
            return 0
        if self._lines is not None:
            content = b"".join(self._lines)
            self.path.write_bytes(content)
            self._lines = [content]
        if not self.path.exists():
            return 0
        if is_local(self.path):
            with Path(self.path).open("ab") as file:
                os.fsync(file.fileno())
            flush_folder(str(self.path.parent))
        return self.path.stat().length

    def close(self) -> None:
        """Write what an object store does not have yet."""
        if self._lines is not None and len(self._lines) > 1:
            self.flush()

    def missing_records(self, size: int) -> str | None:
        """Check whether the file is shorter than a size that `flush` returned, in bytes.

        Returns:
            A sentence, or None if the file is long enough.
        """
        found = self.path.stat().length if self.path.exists() else 0
        if found >= size:
            return None
        return (
            f"{self.path} has {found} bytes, but had {size} when this checkpoint was saved: "
            "records are missing"
        )

    def cut(self, size: int) -> None:
        """Cut the file back to a size that `flush` returned, in bytes.

        Raises:
            RecordsError: the file is shorter: records are missing.
        """
        if jax.process_index() > 0:
            return
        if (problem := self.missing_records(size)) is not None:
            raise RecordsError(f"{problem}; restore the file, or choose another run_dir")
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) > size:
            write_atomically(self.path, content[:size])
        self._lines = None

    def cut_from(self, step: int) -> None:
        """Remove the records of a step and of all later ones, and lines that are not records.

        Args:
            step: the first that a resumed run writes again.
        """
        if jax.process_index() > 0 or not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if 0 <= _step_of(line) < step]
        if len(kept) < len(lines):
            write_atomically(self.path, b"".join(kept))
        self._lines = None

    def last_step(self) -> int:
        """The largest `step` of all complete records; −1 if there is none."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        return max(map(_step_of, lines), default=-1)


def _step_of(line: bytes) -> int:
    """The step of a record; −1 if the line is not a whole one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1
    return step if type(step) is int else -1  # an altered line may have anything there
