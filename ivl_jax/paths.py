"""Folders and files, local or on an object store, and durable writes.

In: a path in any form. Out: `etils.epath` paths that Orbax accepts, and files that have either
their old content or their new content, never part of it. Does not import JAX.
"""

import contextlib
import functools
import importlib.util
import os
import uuid
from pathlib import Path

from etils import epath

_GCS = "gs://"


class MissingExtraError(ImportError):
    """A path that needs a package which is not installed: which path, which extra."""


class StoreError(OSError):
    """An object store that cannot be used: which path, why, remedy."""


class LocalPathError(ValueError):
    """A URL where only a local path works: what, where, remedy."""


def usable_path(path: epath.PathLike) -> epath.Path:
    """A path that can be read and written: `~` expanded; for a URL its package is installed.

    Every path that a user may give as a URL passes through here before it is used.

    Args:
        path: a local path or a URL such as `gs://…`.

    Returns:
        The path.

    Raises:
        MissingExtraError: a gs:// path, and the extra `gcs` is not installed.
        StoreError: there is no such bucket, or it cannot be read.
    """
    path = epath.Path(path)
    if is_local(path):
        return path.expanduser()
    if os.fspath(path).startswith(_GCS):
        _prepare_gcs(path)
    return path


def _prepare_gcs(path: epath.Path) -> None:
    """Check that gs:// paths can be used, and let every look at a folder be a new one."""
    if importlib.util.find_spec("gcsfs") is None:
        raise MissingExtraError(
            f"{path}: gs:// paths need the extra `gcs`: pip install 'ivl_jax[gcs]' (in a clone: "
            "pip install -e '.[gcs]')"
        )
    import fsspec.config

    # gcsfs never forgets a listing, and TensorStore writes arrays without telling it.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    bucket = os.fspath(path).removeprefix(_GCS).split("/")[0]
    # gcsfs would create it, for a misspelt name too.
    try:
        found = _is_bucket(bucket)
    except Exception as error:  # of gcsfs, aiohttp or google.auth
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{path}: the bucket cannot be read: {reason}; are these the right credentials? "
            "(gcloud auth application-default login)"
        ) from error
    if not found:
        raise StoreError(
            f"{path}: there is no bucket {bucket}, or these credentials may not see it: check the "
            f"name, or create it (gcloud storage buckets create {_GCS}{bucket})"
        )


@functools.cache
def _is_bucket(name: str) -> bool:
    return epath.Path(f"{_GCS}{name}").exists()


def absolute_path(path: epath.PathLike) -> epath.Path:
    """A path as Orbax expects it: absolute, `~` expanded; URLs unchanged.

    Args:
        path: a local path, relative to the working directory or not, or a URL such as `gs://…`.

    Returns:
        The path.

    Raises:
        MissingExtraError: as `usable_path`.
    """
    path = usable_path(path)
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """A path that must be local, since it is appended to, locked or mapped into memory.

    Args:
        path: as given.
        what: the flag or field that names it, for the error.

    Returns:
        The path.

    Raises:
        LocalPathError: it is a URL.
    """
    if not is_local(path):
        raise LocalPathError(
            f"{what}: {os.fspath(path)} is not a local path, which it must be: use a local one, "
            "and copy it from or to the store (gcloud storage cp)"
        )
    return Path(path)


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
