"""Folders and files, local or on an object store, and durable writes.

In: a path in any form. Out: `etils.epath` paths that Orbax accepts, and files that have either
their old content or their new content, never part of it. Does not import JAX.
"""

import contextlib
import os
import uuid

from etils import epath


def absolute_path(path: epath.PathLike) -> epath.Path:
    """A path as Orbax expects it: absolute, `~` expanded; URLs unchanged.

    Args:
        path: a local path, relative to the working directory or not, or a URL such as `gs://…`.

    Returns:
        The path.
    """
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is in the local file system rather than on an object store."""
    return "://" not in os.fspath(path)


def write_atomically(path: epath.PathLike, content: bytes) -> None:
    """Write a file so that at every moment it has either the old content or the new.

    When this returns, a local file and its directory entry are on the disk and survive a power
    failure.

    Args:
        path: the file; on object stores, where a write is already atomic, it is written directly.
        content: its bytes.
    """
    path = epath.Path(path)
    if not is_local(path):
        path.write_bytes(content)
        return
    name = os.fspath(path)
    temporary = f"{name}.tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    flush_folder(os.path.dirname(name) or ".")


def flush_folder(folder: str) -> None:
    """Flush a local folder's directory entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
