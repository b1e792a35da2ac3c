"""Folders and files, local or on an object store, and what makes a write durable.

In: anything a path can be given as. Out: `etils.epath` paths that Orbax takes, and files that hold
their old content or their new one, never a part. Imports no JAX.
"""

import contextlib
import os
import uuid

from etils import epath


def absolute_path(path: epath.PathLike) -> epath.Path:
    """Give a path as Orbax wants it: absolute, `~` resolved; URLs as they are.

    Args:
        path: a local path, relative to the working directory or not, or a URL such as `gs://…`.

    Returns:
        The path.
    """
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def is_local(path: epath.PathLike) -> bool:
    """Say whether a path is in the local file system, not on an object store."""
    return "://" not in os.fspath(path)


def write_atomically(path: epath.PathLike, content: bytes) -> None:
    """Write a file such that it holds, at every moment, the old content or the new, never a part.

    A local file is on the disk, its name included, when this returns: a power failure keeps it.

    Args:
        path: the file; on object stores, where one write is atomic already, it is written directly.
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
    """Make the names in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
