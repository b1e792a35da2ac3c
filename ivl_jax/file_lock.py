"""One process at a time: a lock file that records who holds it.

In: the path of the lock file. Out: the lock, or an error that names host, process and time. The
lock is the operating system's, so it ends with its process, even after `kill -9`; a killed process
leaves a lock file that nobody holds. Object stores have no such locks; there, the file only tells
the next process who was the last.
"""

import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from etils import epath

from ivl_jax.json_files import read_json_object, write_json

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

logger = logging.getLogger(__name__)

# Some file systems report a taken lock as EACCES.
_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}


class LockedError(RuntimeError):
    """Another process holds the lock: host, process id, since when, its command."""


class FileLock:
    """Context manager that holds a lock file, which is removed when the lock is released.

    If the file system cannot lock, a warning says so and names the holder recorded in the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Set the path of the lock file, without creating it.

        Args:
            path: a local file; its folder must exist when the lock is taken.
        """
        self.path = Path(path)
        self._descriptor: int | None = None

    def __enter__(self) -> "FileLock":
        """Take the lock.

        Raises:
            LockedError: another process holds it; the message names the process.
            OSError: the file cannot be written.
        """
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
                # The previous holder may have removed the file after we opened it.
                if _is_file(descriptor, self.path):
                    self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        left = _read_holder(self.path)
        if left is not None and left["host"] != socket.gethostname():
            # On some shared file systems a lock is visible to one host only.
            logger.warning("%s left its lock behind: make sure that it has ended", _describe(left))
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(_this_process(), indent=1).encode() + b"\n", 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            if _is_file(descriptor, self.path):
                self.path.unlink(missing_ok=True)
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        """Take the operating system's lock, or warn that locking is not supported."""
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(self.path)
            who = _describe(holder) if holder else "another process"
            if error.errno in _TAKEN:
                raise LockedError(f"{who} holds {self.path}") from None
            logger.warning(
                "%s cannot be locked (%s): make sure that %s does not write to %s",
                self.path,
                error.strerror,
                who,
                self.path.parent,
            )


@contextlib.contextmanager
def record_holder(path: epath.Path) -> Iterator[None]:
    """Record who works in a folder where nothing can be locked, on an object store.

    Nobody is kept out; a record that is there already is named in a warning.

    Args:
        path: the record.

    Yields:
        Nothing; afterwards the record is removed, unless it is another's by then.
    """
    left, now = _read_holder(path), _this_process()
    if left is None:
        logger.info("%s cannot be locked: make sure that no other run writes there", path.parent)
    else:
        logger.warning(
            "%s has not said that it has ended, and %s cannot be locked: make sure that it has",
            _describe(left),
            path.parent,
        )
    write_json(path, now)
    try:
        yield
    finally:
        if _read_holder(path) == now:
            path.unlink(missing_ok=True)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _read_holder(path: epath.PathLike) -> dict[str, str | int] | None:
    """Read the record of the last holder; None if there is none."""
    try:
        holder = read_json_object(path)
        return {name: holder[name] for name in ("host", "pid", "since", "command")}
    except (OSError, ValueError, KeyError):
        return None


def _describe(holder: dict[str, str | int]) -> str:
    return (
        f"process {holder['pid']} on {holder['host']}, since {holder['since']} "
        f"({holder['command']})"
    )
