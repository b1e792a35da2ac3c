"""The TPUs that can be planned for: figures of a chip, and the slices that exist.

In: a family's name. Out: `TpuFamily`. A slice is named by its chips (v5e, v6e) or its cores (v5p,
tpu7x: two per chip).

Sources: Google Cloud's TPU documentation, system architecture of each version: peak bf16 rate, HBM
bandwidth and inter-chip bandwidth per chip (v5e 1,600 Gbit/s, v6e 3,200, v5p 4,800, of all links in
one direction; TPU7x 1,200 GB/s in both), and the supported topologies. Memory is what the compiler
(libtpu 0.0.42) says is available to a program.
"""

import math
from dataclasses import dataclass

_GIB = 1 << 30


@dataclass(frozen=True)
class TpuFamily:
    """One version of the TPU. Rates and memory are per device."""

    topology: str
    """As the compiler names it."""
    shapes: tuple[tuple[int, ...], ...]
    """Slices, by chips along each dimension."""
    named_by: int
    """What the number in a slice's name counts per chip."""
    devices_per_chip: int
    """Devices that JAX sees per chip."""
    memory: int
    """Bytes that a program may use."""
    peak_flops: float
    """bf16 FLOP/s."""
    bandwidth: float
    """Bytes of memory per second."""
    interconnect: float
    """Bytes per second that it sends over all its links to other chips."""

    def slices(self) -> dict[int, tuple[int, ...]]:
        """Number in a slice's name → chips along each dimension."""
        return {math.prod(shape) * self.named_by: shape for shape in self.shapes}


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))


def _family(
    topology: str,
    shapes: tuple[tuple[int, ...], ...],
    *,
    cores: int = 1,
    devices: int = 1,
    gib: float,
    tflops: float,
    bandwidth: float,
    interconnect: float,
) -> TpuFamily:
    """From figures per chip, in TFLOP/s and GB/s; memory per device, in GiB."""
    rates = (tflops * 1e12 / devices, bandwidth * 1e9 / devices, interconnect * 1e9 / devices)
    return TpuFamily(topology, shapes, cores, devices, int(gib * _GIB), *rates)


TPU_FAMILIES = {
    "v5e": _family("v5e", _FLAT, gib=15.75, tflops=197.0, bandwidth=819.0, interconnect=200.0),
    "v5p": _family(
        "v5", _DEEP, cores=2, gib=95.74, tflops=459.0, bandwidth=2765.0, interconnect=600.0
    ),
    "v6e": _family("v6e", _FLAT, gib=31.25, tflops=918.0, bandwidth=1640.0, interconnect=400.0),
    "tpu7x": _family(
        "tpu7x",
        ((1, 1, 1), *_DEEP),
        cores=2,
        devices=2,
        gib=94.75,
        tflops=2307.0,
        bandwidth=7380.0,
        interconnect=600.0,
    ),
}
