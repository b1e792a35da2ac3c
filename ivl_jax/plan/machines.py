"""The machines that can be planned for: chips, memory and peak rates, by the names they rent under.

In: a name such as `v5e-8` or `h100-8`. Out: `Machine`. Figures are from the vendors' data sheets;
usable memory is what the compiler itself allows a program on a TPU, and JAX's pool on a GPU.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

from ivl_jax.config import ConfigError
from ivl_jax.plan.gpu_chips import GPU_CHIPS


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

    def flops(self, dtype: str) -> float:
        """FLOP/s per device in a dtype."""
        return self.float32_flops if dtype == "float32" else self.peak_flops


@dataclass(frozen=True)
class _Family:
    topology: str
    shapes: tuple[tuple[int, ...], ...]
    per_chip: int  # what the number in a slice's name counts per chip
    memory: int
    peak_flops: float
    bandwidth: float


_GIB = 1 << 30
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))
_FAMILIES = {
    "v5e": _Family("v5e", _FLAT, 1, int(15.75 * _GIB), 197e12, 819e9),
    # Named by cores, two per chip.
    "v5p": _Family("v5", _DEEP, 2, int(95.0 * _GIB), 459e12, 2765e9),
    "v6e": _Family("v6e", _FLAT, 1, int(31.25 * _GIB), 918e12, 1640e9),
}
_GPUS_PER_HOST = (1, 2, 4, 8)
_POOL = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def _machines() -> dict[str, Machine]:
    machines = {}
    for name, family in _FAMILIES.items():
        for shape in family.shapes:
            chips = 1
            for size in shape:
                chips *= size
            topology = f"{family.topology}:{'x'.join(map(str, shape))}"
            label = f"{name}-{chips * family.per_chip}"
            # Float32 products are one pass in bfloat16 at JAX's default precision.
            rates = (family.peak_flops, family.peak_flops, family.bandwidth)
            machines[label] = Machine(label, topology, chips, family.memory, *rates)
    for name, chip in GPU_CHIPS.items():
        for count in _GPUS_PER_HOST:
            label, rates = f"{name}-{count}", (chip.peak_flops, chip.float32_flops, chip.bandwidth)
            machines[label] = Machine(label, name, count, chip.memory, *rates, "gpu")
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
    if name not in MACHINES:
        raise ConfigError(f"--on {name}: not a known machine; known are {', '.join(MACHINES)}")
    machine = MACHINES[name]
    if machine.platform == "tpu":
        return machine
    return dataclasses.replace(machine, memory=int(machine.memory * pool_fraction()))


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
