"""Identifies a model folder's weights by one hash over all their bytes.

In: a folder with safetensors files. Out: its fingerprint; files that have not changed since they
were last hashed are not read again.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rich
from etils import epath
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ivl_jax.json_files import MalformedFileError, read_json_object, write_json
from ivl_jax.paths import usable_path

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 24
_THREADS = 4


def weights_fingerprint(folder: Path, *, remembered: epath.PathLike | None = None) -> str:
    """Hash all bytes of a model's weights.

    Args:
        folder: with the safetensors files.
        remembered: a file that keeps, for each weights file, its size, times and hash, so that
            unchanged files are not read; None: everything is read.

    Returns:
        SHA-256 over names and contents.
    """
    known = _read_remembered(remembered)
    paths = sorted(folder.glob("*.safetensors"))
    state = {path.name: _state(path) for path in paths}
    now = {name: known.get(name) for name in state}
    unknown = [path for path in paths if (known.get(path.name) or [])[:-1] != state[path.name]]
    for path, digest in zip(unknown, _hash_files(folder, unknown), strict=True):
        now[path.name] = [*state[path.name], digest]
    if remembered is not None and now != known:
        remembered = epath.Path(remembered)
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, now)
    digests = {name: entry[-1] for name, entry in now.items() if entry}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def combined_fingerprint(fingerprints: Sequence[str]) -> str:
    """One fingerprint for several models, in order; for a single model its own.

    Args:
        fingerprints: at least one.

    Returns:
        The fingerprint.
    """
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256(json.dumps(list(fingerprints)).encode()).hexdigest()


def remembered_weights(data_dir: epath.PathLike, model: str) -> epath.Path:
    """The file that remembers the hashes of a model's weights.

    Args:
        data_dir: where a run keeps what other runs can reuse.
        model: folder or hub id.

    Returns:
        The file.
    """
    return usable_path(data_dir) / "weights" / f"{folder_name(model)}.json"


def folder_name(model: str) -> str:
    """A folder name for a model: the last part of its name and a hash of the whole name."""
    last = re.sub(r"[^A-Za-z0-9.-]+", "_", model.rstrip("/").rsplit("/", 1)[-1]) or "base"
    return f"{last}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _read_remembered(path: epath.PathLike | None) -> dict[str, Any]:
    """The remembered hashes; an unreadable file is ignored, which only costs time."""
    if path is None:
        return {}
    try:
        known = read_json_object(path)
    except FileNotFoundError:
        return {}
    except (MalformedFileError, OSError) as error:
        logger.warning("hashing weights again: %s", error)
        return {}
    return {name: entry for name, entry in known.items() if isinstance(entry, list)}


def _state(path: Path) -> list[str | int]:
    """What changes when a file does (a program cannot set the ctime)."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _hash_files(folder: Path, paths: list[Path]) -> list[str]:
    console = rich.get_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        total = sum(path.stat().st_size for path in paths)
        task = bar.add_task(f"hashing the weights of {folder.name}", total=total)

        def digest_of(path: Path) -> str:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    bar.advance(task, len(block))
            return digest.hexdigest()

        return list(pool.map(digest_of, paths))
