"""Compiled programs that are kept on disk, so that the next start need not compile them again.

In: the flag `--compilation-cache`. Out: JAX's persistent compilation cache is on, or off.
"""

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax

NO_CACHE = "none"
_MOST_BYTES = 4 << 30


def use_compilation_cache(folder: str) -> None:
    """Turn JAX's persistent compilation cache on, unless it is off.

    Args:
        folder: where it is; empty: `default_folder()`, or what JAX has been told already, by
            `JAX_COMPILATION_CACHE_DIR` for instance; `none`: no cache.
    """
    if folder == NO_CACHE:
        jax.config.update("jax_compilation_cache_dir", None)
    elif folder:
        jax.config.update("jax_compilation_cache_dir", folder)
    elif _current_folder() is None and (default := default_folder()):
        if importlib.util.find_spec("filelock") is not None:  # which JAX needs for it
            # Nobody looks after a folder that nobody named: the least recently used goes first.
            jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(default))


def describe_compiling() -> str:
    """What to say before programs are compiled, which may take minutes."""
    folder = _current_folder()
    return "compiling" if folder is None else f"compiling; programs are kept in {folder}"


def default_folder() -> Path | None:
    """The folder of this machine's programs among the user's caches.

    Returns:
        `ivl_jax/compiled/…` in `XDG_CACHE_HOME`, else in `~/.cache`; None where it cannot be
        written.
    """
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "ivl_jax" / "compiled" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home folder, or one that is read-only
        return None
    return folder if os.access(folder, os.W_OK) else None


def _machine() -> str:
    """What compiled programs depend on beyond JAX's own key: a home may belong to many machines."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text(encoding="utf-8", errors="replace") if cpu.exists() else ""
    features = next((line for line in text.splitlines() if line.startswith("flags")), "")
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return f"{platform.system()}-{platform.machine()}-{digest}".lower()


def _current_folder() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]
