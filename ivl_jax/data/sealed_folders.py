"""Folders of derived data that are whole, unaltered, or made again.

In: a folder's path and a function that fills one. Out: what the function recorded when the folder
was filled, its files being, byte for byte, what they were then. Nothing is ever read from a folder
that is half written, truncated or altered by a single bit.
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
    """Make sure that a folder holds what it was filled with, and fill it where it does not.

    Several processes may do this at once: the folder appears whole, by one rename.

    Args:
        folder: The folder.
        fill: Makes a folder of another name, writes the files into it, and returns what to record
            beside their hashes, any JSON. Whoever calls it for the same folder writes the same.
        what: What to call the folder's content in a notice.

    Returns:
        What `fill` returned, now or then.
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
                "%s in %s are not as they were written and are made again: %s",
                what,
                folder,
                problems,
            )
            _remove(folder)
            return _fill(folder, fill)
    return _fill(folder, fill)


def _read(folder: epath.Path) -> tuple[Mapping[str, Any] | None, str]:
    """What was recorded of a sound folder; or why it is not sound."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return None, str(error)
    problems = file_problems(folder, manifest)
    return (None, "; ".join(problems)) if problems else (manifest.about, "")


def _fill(folder: epath.Path, fill: Callable[[epath.Path], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Fills a folder that appears only when all of it is on the disk."""
    temporary = folder.parent / f"incomplete-{uuid.uuid4().hex}"
    try:
        record = write_manifest(temporary, fill(temporary)).about
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster: what it wrote is the same
            if not folder.exists():
                raise
    finally:
        with contextlib.suppress(OSError):
            temporary.rmtree(missing_ok=True)
    if is_local(folder):
        flush_folder(os.fspath(folder.parent))
    return record


def _remove(folder: epath.Path) -> None:
    """Takes a folder away at once, whatever it holds."""
    aside = folder.parent / f"damaged-{uuid.uuid4().hex}"
    folder.rename(aside)
    with contextlib.suppress(OSError):
        aside.rmtree()


@contextlib.contextmanager
def _one_at_a_time(folder: epath.Path) -> Iterator[None]:
    """Holds a lock beside a local folder; the system lets go of it when the process ends."""
    if not is_local(folder):
        yield
        return
    import fcntl

    with open(f"{os.fspath(folder)}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
