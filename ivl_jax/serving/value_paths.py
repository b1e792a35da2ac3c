"""Paths that requests name: none leads out of the folder that the server was given.

In: that folder, and a path from a request. Out: an absolute path without links, below the folder.
"""

import os
from pathlib import Path

from ivl_jax.serving.errors import ApiError, invalid


def find_below(root: Path, given: str, *, field: str) -> Path:
    """Find what a request names.

    Args:
        root: the folder, resolved.
        given: a path relative to it.
        field: of the request's body.

    Returns:
        The path, all links followed; it exists.

    Raises:
        ApiError: with status 403 where it leads out of the folder, by itself or by a link; 404
            where there is nothing; 400 where it cannot be a path.
    """
    try:
        # Before the disk is looked at: nobody learns what there is elsewhere.
        written = Path(os.path.normpath(root / given))
        if written == root or not written.is_relative_to(root):
            raise _outside(given, field)
        found = written.resolve()
        if not found.is_relative_to(root):
            raise _outside(given, field)
        exists = found.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
        raise invalid(f"{field}: {given!r:.100} cannot be a path", field) from error
    if not exists:
        raise ApiError(404, f"{field}: there is no {given!r:.200} below --values-dir", param=field)
    return found


def refuse_links_out(root: Path, folder: Path, *, field: str) -> None:
    """Refuse a folder in which a link leads out of the server's folder.

    Args:
        root: the server's folder, resolved.
        folder: below it, resolved.
        field: of the request's body.

    Raises:
        ApiError: with status 403.
    """
    seen, left = {folder}, [folder]
    while left:
        # A walk does not enter linked folders, and what reads the value network does.
        for where, folders, files in os.walk(left.pop()):
            for name in (*folders, *files):
                path = Path(where, name)
                if not path.is_symlink():
                    continue
                target = _target(path)
                if target is None or not target.is_relative_to(root):
                    raise _outside(str(path.relative_to(root)), field)
                if target.is_dir() and target not in seen:
                    seen.add(target)
                    left.append(target)


def _target(link: Path) -> Path | None:
    """Where a link leads in the end; None: nowhere."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return None


def _outside(given: str, field: str) -> ApiError:
    return ApiError(
        403,
        f"{field}: {given!r:.200} is not below --values-dir, the folder that value networks are "
        "loaded from: name a path relative to that folder",
        param=field,
        code="path_not_allowed",
    )
