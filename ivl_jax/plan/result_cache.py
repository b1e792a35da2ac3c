"""Keeps what compilations found on disk, since one takes minutes.

In: everything that a compilation depends on. Out: a record, or None. The key contains the program
itself, the compilers' versions and flags, so that no change of the package, of JAX or of a config
is answered by an old record.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Change it with what is recorded, or how it is counted.
_FORMAT = "2"
_COMPILERS = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-pjrt",
    "jax-cuda12-plugin",
    "jax-cuda13-pjrt",
    "jax-cuda13-plugin",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-cuda-nvcc",
)
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def compilation_key(program: str, parts: Sequence[str]) -> str:
    """Make the key of a compilation.

    Args:
        program: the lowered program's text.
        parts: whatever else decides the result: the machine, compiler options.

    Returns:
        A hash of these and of the compilers' versions and flags.
    """
    digest = hashlib.sha256()
    versions = (f"{name} {_version(name)}" for name in _COMPILERS)
    flags = (f"{name} {os.environ.get(name, '')}" for name in _FLAGS)
    for part in (_FORMAT, *versions, *flags, *parts, program):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def find_record(key: str) -> Mapping[str, Any] | None:
    """Read a record; a file that cannot be read is the same as none."""
    folder = _folder()
    if folder is None:
        return None
    try:
        record = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def keep_record(key: str, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all; does nothing where there is no folder for caches."""
    folder = _folder()
    if folder is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(file.name, folder / f"{key}.json")
    except OSError:
        return


def _folder() -> Path | None:
    """`ivl_jax/plans` in `XDG_CACHE_HOME`, else in `~/.cache`; None where it cannot be made."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivl_jax/plans"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home folder, or one that is read-only
        return None
    return folder


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
