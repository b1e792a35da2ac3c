"""Folders of derived data that are complete and unaltered, or else made again.

In: a folder's path and a function that fills one. Out: what the function recorded when the folder
was filled, and where its files are; they are checked to be the same, byte for byte. Nothing is ever
read from a folder that is incomplete, truncated or altered by a single bit.

Files are read in ways that need a local disk (ArrayRecord, memory maps). A folder on an object
store is therefore filled locally and copied there, its manifest last, and each process reads its
own local copy, which is deleted when the process ends.
"""

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from ivl_jax.folder_copies import copy_files, file_names
from ivl_jax.manifest import (
    MANIFEST_NAME,
    ManifestError,
    file_problems,
    read_manifest,
    write_manifest,
)
from ivl_jax.paths import flush_folder, is_local

_LOGGER = logging.getLogger(__name__)

_Fill = Callable[[epath.Path], Mapping[str, Any]]


class SealedFolder(NamedTuple):
    """A folder whose files are as they were written."""

    path: epath.Path  # a local folder with the files: the folder itself, or a copy of it
    record: Mapping[str, Any]  # what was recorded when it was filled


def open_sealed_folder(folder: epath.Path, fill: _Fill, *, what: str) -> SealedFolder:
    """Check that a folder has its original content, and otherwise fill it again.

    Several processes may do this at once: the folder appears by a single rename. On an object
    store, where there is none, process 0 of those that compute together writes it.

    Args:
        folder: The folder, local or a URL that `etils.epath` writes.
        fill: Creates a folder of another name, writes the files into it, and returns what to record
            with their hashes, any JSON. Every call for the same folder must write the same.
        what: The name of the folder's content in a warning.

    Returns:
        The files, and the record that `fill` returned, now or earlier.
    """
    if is_local(folder):
        return SealedFolder(folder, _open_local(folder, fill, what))
    digest = hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:16]
    local = _copies_folder() / digest / folder.name
    filled = False

    def download_or_fill(temporary: epath.Path) -> Mapping[str, Any]:
        nonlocal filled
        problems = ""
        if folder.exists():
            record, problems = _download(folder, temporary)
            if record is not None:
                return record
            _warn_of_changes(what, folder, problems)
        filled = True
        return fill(temporary)

    record = _open_local(local, download_or_fill, what)
    if filled and jax.process_index() == 0:
        # Without its manifest it is incomplete, whatever happens until the new one is there.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        copy_files(local, folder, file_names(local), last=(MANIFEST_NAME,))
    return SealedFolder(local, record)


def _download(folder: epath.Path, local: epath.Path) -> tuple[Mapping[str, Any] | None, str]:
    """Copy an intact folder to a local one; or why it is not intact, and no local folder."""
    try:
        manifest = read_manifest(folder)
        copy_files(folder, local, manifest.files)
        problems = file_problems(local, manifest)
    except ManifestError as error:
        return None, str(error)
    except FileNotFoundError as error:
        problems = (f"a file is missing ({error})",)
    if problems:
        local.rmtree(missing_ok=True)
        return None, "; ".join(problems)
    return manifest.about, ""


@functools.cache
def _copies_folder() -> epath.Path:
    """A local folder for copies, which ends with the process."""
    name = tempfile.mkdtemp(prefix="ivl_jax-data-")
    atexit.register(shutil.rmtree, name, ignore_errors=True)
    return epath.Path(name)


def _open_local(folder: epath.Path, fill: _Fill, what: str) -> Mapping[str, Any]:
    if folder.exists():
        record, problems = _read(folder)
        if record is not None:
            return record
        with _one_at_a_time(folder):
            record, problems = _read(folder)  # another process may have made it again
            if record is not None:
                return record
            _warn_of_changes(what, folder, problems)
            _remove(folder)
            return _fill(folder, fill)
    return _fill(folder, fill)


def _warn_of_changes(what: str, folder: epath.Path, problems: str) -> None:
    _LOGGER.warning(
        "%s in %s were changed after they were written and are made again: %s",
        what,
        folder,
        problems,
    )


def _read(folder: epath.Path) -> tuple[Mapping[str, Any] | None, str]:
    """The record of an intact folder; or why it is not intact."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return None, str(error)
    problems = file_problems(folder, manifest)
    return (None, "; ".join(problems)) if problems else (manifest.about, "")


def _fill(folder: epath.Path, fill: _Fill) -> Mapping[str, Any]:
    """Fills a folder, which appears only once it is completely on the disk."""
    temporary = folder.parent / f"incomplete-{uuid.uuid4().hex}"
    try:
        record = write_manifest(temporary, fill(temporary)).about
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster and wrote the same
            if not folder.exists():
                raise
    finally:
        with contextlib.suppress(OSError):
            temporary.rmtree(missing_ok=True)
    flush_folder(os.fspath(folder.parent))
    return record


def _remove(folder: epath.Path) -> None:
    """Removes a folder atomically, whatever its content."""
    aside = folder.parent / f"damaged-{uuid.uuid4().hex}"
    folder.rename(aside)
    with contextlib.suppress(OSError):
        aside.rmtree()


@contextlib.contextmanager
def _one_at_a_time(folder: epath.Path) -> Iterator[None]:
    """Holds a lock for a local folder, which the system releases when the process ends."""
    import fcntl

    with open(f"{os.fspath(folder)}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
