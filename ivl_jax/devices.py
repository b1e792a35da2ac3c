"""What this machine offers: memory per device, and accelerators that JAX does not use.

In: a mesh, or nothing. Out: bytes, or a sentence for the user.
"""

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

# Device files of accelerators: CUDA driver, TPU driver (VFIO groups are numbered).
_DEVICE_FILES = {
    "GPU": ("/dev/nvidia0", "/dev/nvidiactl"),
    "TPU": ("/dev/accel0", "/dev/vfio/0"),
}
_EXTRAS = {"GPU": "cuda12", "TPU": "tpu"}


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that one device of a mesh can hold; None if unknown.

    Virtual CPU devices share the machine's memory.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        total = host_memory()
        return None if total is None else total // mesh.devices.size
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory() -> int | None:
    """Bytes of this machine's memory; None if unknown."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: jax.Device) -> int | None:
    """Bytes that are free on a device; None if unknown.

    Args:
        device: an accelerator, or a CPU device, which has the machine's memory.
    """
    if device.platform == "cpu":
        return _available_host_memory()
    figures = device.memory_stats() or {}
    if "bytes_limit" not in figures:
        return None
    return figures["bytes_limit"] - figures.get("bytes_in_use", 0)


def _available_host_memory() -> int | None:
    """As Linux estimates it: free pages, and those that it can free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


_LEAST_RESERVE = 256 << 20


def default_cache_bytes(free: int) -> int:
    """Bytes that caches may take on a device where no limit is given.

    Args:
        free: bytes that are free on it, the models loaded.

    Returns:
        All but a reserve for activations and logits: a tenth or 256 MiB, whichever is more, but
        never more than half.

    Example:
        >>> default_cache_bytes(10 << 30) == 9 << 30
        True
        >>> default_cache_bytes(300 << 20) == 150 << 20
        True
    """
    return max(1, free - min(free // 2, max(free // 10, _LEAST_RESERVE)))


def unused_accelerator() -> str | None:
    """Find an accelerator on this machine that JAX does not use.

    Returns:
        A sentence with the remedy if JAX runs on CPU although there is a GPU or TPU; else None.
    """
    if jax.default_backend() != "cpu":
        return None
    present = [kind for kind, paths in _DEVICE_FILES.items() if any(map(os.path.exists, paths))]
    if not present:
        return None
    asked = os.environ.get("JAX_PLATFORMS", "")
    why = (
        f"JAX_PLATFORMS={asked} is set: unset it"
        if asked
        else "install the build of JAX for it: pip install -U "
        + " or ".join(f"'jax[{_EXTRAS[kind]}]'" for kind in present)
    )
    return f"a {' and a '.join(present)} is present, but JAX RUNS ON THE CPU; {why}"
