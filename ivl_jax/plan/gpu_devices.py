"""Devices of a GPU machine that is not attached, and how its compiler is called.

In: a chip's description. Out: devices that programs can be compiled for, and compiler options. The
compiler is in JAX's CUDA plugin, which needs no driver; it calls `ptxas` of NVIDIA's nvcc package.
"""

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import topologies
from jaxlib import xla_client


def missing_packages() -> list[str]:
    """What the compiler lacks: packages of the extra `plan-gpu`."""
    plugin = any(_found(f"jax_plugins.xla_cuda{major}") for major in (12, 13))
    found = {"JAX's CUDA plugin": plugin, "nvidia-cuda-nvcc": _nvcc() is not None}
    return [name for name, here in found.items() if not here]


def describe_gpus(description: str, *, count: int) -> list[jax.Device]:
    """Make the devices of one host.

    Args:
        description: of the chip, from `target_config`.
        count: how many.

    Returns:
        The devices.
    """
    jax.devices("cpu")  # JAX then knows its plugins, each of which may be loaded only once
    if not xla_client.pjrt_plugin_initialized("cuda"):
        xla_client.initialize_pjrt_plugin("cuda")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="gpu", topology=f"1x1x{count}", target_config=description
    )
    return list(topology.devices)


def compiler_options() -> dict[str, str | int]:
    """Options without which no GPU program compiles here: kernels cannot be timed without a GPU."""
    nvcc = _nvcc()
    assert nvcc is not None, "missing_packages is asked first"
    return {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(nvcc)}


@contextlib.contextmanager
def ptxas_on_path() -> Iterator[None]:
    """Let the compiler find `ptxas`, last on `PATH`."""
    nvcc, before = _nvcc(), os.environ.get("PATH", "")
    assert nvcc is not None, "missing_packages is asked first"
    os.environ["PATH"] = f"{before}{os.pathsep}{nvcc / 'bin'}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _nvcc() -> Path | None:
    """The folder of NVIDIA's nvcc package: `bin/ptxas` and `nvvm/libdevice`."""
    for name in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        spec = find_spec(name) if _found("nvidia") else None
        for folder in (spec and spec.submodule_search_locations) or ():
            if (Path(folder) / "bin" / "ptxas").exists():
                return Path(folder)
    return None


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False
