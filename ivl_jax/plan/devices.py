"""Devices of a machine that is not attached, for the compiler that would run there.

In: a machine. Out: its devices; programs can be compiled for them, but not run.
"""

import os
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from ivl_jax.plan.gpu_chips import GPU_CHIPS, target_config
from ivl_jax.plan.gpu_devices import describe_gpus, missing_packages
from ivl_jax.plan.machines import Machine

# What libtpu asks of its surroundings before it compiles: no metadata server, no lock on a TPU, and
# answers to what it would otherwise complain about. The topology decides what is compiled for.
_COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


class MissingCompilerError(RuntimeError):
    """The machine's compiler is not installed."""


def describe_devices(machine: Machine) -> list[jax.Device]:
    """Make the devices of a machine.

    Args:
        machine: from `find_machine`.

    Returns:
        Its devices, in the order of a mesh.

    Raises:
        MissingCompilerError: its compiler is not installed; names the extra.
    """
    if machine.platform == "gpu":
        if missing := missing_packages():
            raise MissingCompilerError(
                f"{machine.name}: programs for it are compiled by XLA's GPU compiler, and "
                f"{' and '.join(missing)} is not installed: pip install 'ivl_jax[plan-gpu]' (in a "
                "clone: pip install -e '.[plan-gpu]')"
            )
        return describe_gpus(target_config(GPU_CHIPS[machine.topology]), count=machine.devices)
    if find_spec("libtpu") is None:
        raise MissingCompilerError(
            f"{machine.name}: programs for it are compiled by libtpu, which is not installed: "
            "pip install 'ivl_jax[plan-tpu]' (in a clone: pip install -e '.[plan-tpu]')"
        )
    for name, value in _COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    sizes = [int(size) for size in machine.topology.split(":")[1].split("x")]
    # A host has up to four chips, or eight where these are the whole slice of a flat family.
    most = (2, 4) if machine.devices == 8 and len(sizes) == 2 else (2, 2, 1)
    bounds = tuple([*map(min, most, sizes), 1, 1][:3])
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=machine.topology,
        chips_per_host_bounds=bounds,
        num_slices=1,
    )
    return list(description.devices)
