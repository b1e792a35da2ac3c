"""The machines that can be planned for: chips, memory and peak rates, by the names they rent under.

In: a name such as `v5e-8`. Out: `Machine`. Figures are from the vendors' data sheets; usable memory
is what the compiler itself allows a program.
"""

from dataclasses import dataclass

from ivl_jax.config import ConfigError


@dataclass(frozen=True)
class Machine:
    """One machine, or one slice of a pod."""

    name: str
    topology: str
    """As the TPU compiler names it."""
    devices: int
    memory: int
    """Bytes of high-bandwidth memory per device that a program may use."""
    peak_flops: float
    """bf16 FLOP/s per device."""


@dataclass(frozen=True)
class _Family:
    topology: str
    shapes: tuple[tuple[int, ...], ...]
    per_chip: int  # what the number in a slice's name counts per chip
    memory: int
    peak_flops: float


_GIB = 1 << 30
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))
_FAMILIES = {
    "v5e": _Family("v5e", _FLAT, 1, int(15.75 * _GIB), 197e12),
    "v5p": _Family("v5", _DEEP, 2, int(95.0 * _GIB), 459e12),  # named by cores, two per chip
    "v6e": _Family("v6e", _FLAT, 1, int(31.25 * _GIB), 918e12),
}


def _machines() -> dict[str, Machine]:
    machines = {}
    for name, family in _FAMILIES.items():
        for shape in family.shapes:
            chips = 1
            for size in shape:
                chips *= size
            topology = f"{family.topology}:{'x'.join(map(str, shape))}"
            label = f"{name}-{chips * family.per_chip}"
            machines[label] = Machine(label, topology, chips, family.memory, family.peak_flops)
    return machines


MACHINES = _machines()


def find_machine(name: str) -> Machine:
    """Look a machine up.

    Args:
        name: a key of `MACHINES`.

    Returns:
        The machine.

    Raises:
        ConfigError: it is not known; lists those that are.
    """
    if name not in MACHINES:
        raise ConfigError(f"--on {name}: not a known machine; known are {', '.join(MACHINES)}")
    return MACHINES[name]
