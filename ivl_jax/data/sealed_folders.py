"""Folders of derived data that are complete and unaltered, or else made again.

In: a folder's path and a function that fills one. Out: what the function recorded when the folder
was filled; the files are checked to be the same, byte for byte. Nothing is ever read from a folder
that is incomplete, truncated or altered by a single bit.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from ivl_jax.manifest import ManifestError, file_problems, read_manifest, write_manifest
from ivl_jax.paths import flush_folder, is_local

_LOGGER = logging.getLogger(__name__)


def open_sealed_folder(
    folder: epath.Path, fill: Callable[[epath.Path], Mapping[str, Any]], *, what: str
) -> Mapping[str, Any]:
    """Check that a folder has its original content, and otherwise fill it again.

    Several processes may do this at once: the folder appears by a single rename.

    Args:
        folder: The folder.
        fill: Creates a folder of another name, writes the files into it, and returns what to record
            with their hashes, any JSON. Every call for the same folder must write the same.
        what: The name of the folder's content in a warning.

    Returns:
        The record that `fill` returned, now or earlier.
    """
    if folder.exists():
        record, problems = _read(folder)
        if record is not None:
            return record
        with _one_at_a_time(folder):
            record, problems = _read(folder)  # another process may have made it again
            if record is not None:
                return record
            _LOGGER.warning(
                "%s in %s were changed after they were written and are made again: %s",
                what,
                folder,
                problems,
            )
            _remove(folder)
            return _fill(folder, fill)
    return _fill(folder, fill)


def _read(folder: epath.Path) -> tuple[Mapping[str, Any] | None, str]:
    """The record of an intact folder; or why it is not intact."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return None, str(error)
    problems = file_problems(folder, manifest)
    return (None, "; ".join(problems)) if problems else (manifest.about, "")


def _fill(folder: epath.Path, fill: Callable[[epath.Path], Mapping[str, Any]]) -> Mapping[str, Any]:
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
    if is_local(folder):
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
    if not is_local(folder):
        yield
        return
    import fcntl

    with open(f"{os.fspath(folder)}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
