"""The machines that can be planned for: chips, memory and peak rates, by the names they rent under.

In: a name such as `v5e-8` or `h100-8`. Out: `Machine`. Figures are from the vendors' data sheets;
usable memory is what the compiler itself allows a program on a TPU, and JAX's pool on a GPU.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal

from ivl_jax.config import ConfigError
from ivl_jax.plan.gpu_chips import GPU_CHIPS
from ivl_jax.plan.tpu_chips import TPU_FAMILIES


@dataclass(frozen=True)
class Machine:
    """One machine, or one slice of a pod."""

    name: str
    topology: str
    """As the TPU compiler names it; for a GPU its key in `GPU_CHIPS`."""
    devices: int
    memory: int
    """Bytes of memory per device that a program may use."""
    peak_flops: float
    """FLOP/s per device in 16-bit floats."""
    float32_flops: float
    """The same in float32 at JAX's default precision."""
    bandwidth: float
    """Bytes of its memory that a device reads per second."""
    platform: Literal["tpu", "gpu"] = "tpu"
    interconnect: float = 0.0
    """Bytes per second that a device sends to others over all its links; 0: not known."""

    @property
    def family(self) -> str:
        """Its name without its number."""
        return self.name.rpartition("-")[0]

    def flops(self, dtype: str) -> float:
        """FLOP/s per device in a dtype."""
        return self.float32_flops if dtype == "float32" else self.peak_flops


# Bytes per second that a GPU sends to those of its host: PCIe 3 and 4, NVLink 3 and 4.
_GPU_LINKS = {
    "t4": 16e9,
    "l4": 32e9,
    "a100-40gb": 300e9,
    "a100-80gb": 300e9,
    "h100": 450e9,
    "h200": 450e9,
}
_GPUS_PER_HOST = (1, 2, 4, 8)
_POOL = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def _machines() -> dict[str, Machine]:
    machines = {}
    for name, family in TPU_FAMILIES.items():
        for number, shape in family.slices().items():
            # Float32 products are one pass in bfloat16 at JAX's default precision.
            rates = (family.peak_flops, family.peak_flops, family.bandwidth)
            machines[f"{name}-{number}"] = Machine(
                f"{name}-{number}",
                f"{family.topology}:{'x'.join(map(str, shape))}",
                math.prod(shape) * family.devices_per_chip,
                family.memory,
                *rates,
                interconnect=family.interconnect,
            )
    for name, chip in GPU_CHIPS.items():
        for count in _GPUS_PER_HOST:
            rates = (chip.peak_flops, chip.float32_flops, chip.bandwidth)
            machines[f"{name}-{count}"] = Machine(
                f"{name}-{count}", name, count, chip.memory, *rates, "gpu", _GPU_LINKS[name]
            )
    return machines


MACHINES = _machines()


def find_machine(name: str) -> Machine:
    """Look a machine up.

    Args:
        name: a key of `MACHINES`.

    Returns:
        The machine; of a GPU's memory the share that JAX takes, which is 75 % unless
        `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise.

    Raises:
        ConfigError: it is not known; lists those that are.
    """
    if name.startswith("7x-"):
        name = f"tpu{name}"
    if name not in MACHINES:
        raise ConfigError(f"{name}: {_not_known(name)}")
    machine = MACHINES[name]
    if machine.platform == "tpu":
        return machine
    return dataclasses.replace(machine, memory=int(machine.memory * pool_fraction()))


def known_machines() -> str:
    """All names, for messages: `v5e-1/4/8, …`."""
    families = dict.fromkeys(machine.family for machine in MACHINES.values())
    return ", ".join(f"{family}-{_listed(family)}" for family in families)


def sizes_of(family: str) -> list[Machine]:
    """The machines of one family, from the smallest to the largest.

    Args:
        family: a machine's name without its number: `v5e`, `h100`.
    """
    return [machine for machine in MACHINES.values() if machine.family == family]


def _not_known(name: str) -> str:
    family, _, number = name.rpartition("-")
    sizes = [int(machine.name.rpartition("-")[2]) for machine in sizes_of(family)]
    if not sizes or not number.isdecimal():
        return f"not a known machine; known are {known_machines()}"
    smaller = [size for size in sizes if size < int(number)][-1:]
    larger = [size for size in sizes if size > int(number)][:1]
    nearest = " and ".join(f"{family}-{size}" for size in (*smaller, *larger))
    return f"there is no {family} of this size; the nearest: {nearest} (all: {_listed(family)})"


def _listed(family: str) -> str:
    return "/".join(machine.name.rpartition("-")[2] for machine in sizes_of(family))


def pool_fraction() -> float:
    """The share of a GPU's memory that JAX takes for its programs.

    Raises:
        ConfigError: the environment variable is not a number between 0 and 1.
    """
    given = os.environ.get(_POOL) or "0.75"
    try:
        fraction = float(given)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ConfigError(f"{_POOL} must be a number in (0, 1], got {given!r}")
    return fraction
