"""Describes the environment of a benchmark.

Out: device, threads, versions and commit, ready for JSON.
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "rapidfuzz",
    "torch",
)


def describe_setting() -> dict[str, Any]:
    """Describe the machine and the software.

    Returns:
        `device`, `threads`, `load_average` (of the last minute: if above `threads`, other programs
        were computing too, and only ratios are meaningful), `versions` and `commit`.
    """
    return {
        "device": _device(),
        "threads": thread_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": _versions(),
        "commit": _commit(),
    }


def thread_count() -> int:
    """Cores that this process may use; peers get as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device() -> str:
    """The processor, and the accelerator if there is one."""
    import jax

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    kinds = {device.device_kind for device in jax.devices() if device.platform != "cpu"}
    return ", ".join([f"{name}, {thread_count()} cores", *sorted(kinds)])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the code, marked if the code differs from it."""
    commands = (
        ["git", "rev-parse", "HEAD"],
        ["git", "status", "--porcelain", "--", "ivl_jax", "benchmarks", "*.py"],
    )
    try:
        commit, changes = (
            subprocess.run(
                command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changes else "")
