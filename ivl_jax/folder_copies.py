"""Copies folders between the local disk and an object store.

In: a folder and the names of its files. Out: the same files in another folder. Neither copy is
atomic: whoever reads the other folder must know when it is complete, from a manifest written last.
"""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from ivl_jax.paths import is_local

_THREADS = 8
_BLOCK_BYTES = 1 << 22


def file_names(folder: epath.PathLike, prefix: str = "") -> list[str]:
    """List all files below a folder.

    Args:
        folder: local or a URL that `etils.epath` reads.
        prefix: what precedes each name.

    Returns:
        Their paths relative to the folder, with `/`.
    """
    names = []
    for path in epath.Path(folder).iterdir():
        if path.is_dir():
            names += file_names(path, f"{prefix}{path.name}/")
        else:
            names.append(prefix + path.name)
    return names


def copy_files(
    source: epath.PathLike,
    target: epath.PathLike,
    names: Iterable[str],
    *,
    last: Sequence[str] = (),
) -> None:
    """Copy files from one folder to another, several at once.

    Args:
        source: a folder, local or a URL that `etils.epath` reads.
        target: another; created if missing.
        names: the files, relative to both folders.
        last: those of them that are copied once all others are there, in this order.

    Raises:
        FileNotFoundError: a file is missing.
    """
    source, target = epath.Path(source), epath.Path(target)
    first = [name for name in names if name not in last]

    def copy(name: str) -> None:
        if is_local(target):  # an object store has no folders
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as read, (target / name).open("wb") as write:
            shutil.copyfileobj(read, write, _BLOCK_BYTES)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, first))
    for name in last:
        copy(name)
