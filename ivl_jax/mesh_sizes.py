"""The sizes of a mesh's three axes: filled in, checked, and those that would fit.

In: sizes as a config gives them, how many devices and slices there are. Out: sizes, or an error
that lists sizes that fit. Does not import JAX.
"""

import math
from collections.abc import Mapping

_MOST_SHOWN = 6


def mesh_sizes(
    wanted: Mapping[str, int], *, devices: int, slices: int = 1, all_used: bool = False
) -> dict[str, int]:
    """Fill in the size that is −1, and check that the sizes fit the devices.

    Args:
        wanted: sizes of data, fsdp and tensor; one may be −1: all remaining devices.
        devices: how many there are.
        slices: into how many parts with slow connections between them they fall; only data, whose
            copies exchange gradients once per step, may span them.
        all_used: whether no device may be left out.

    Returns:
        The sizes, in the same order.

    Raises:
        ValueError: they do not fit; the message lists sizes that do, those nearest to the wanted.

    Example:
        >>> mesh_sizes({"data": 1, "fsdp": -1, "tensor": 2}, devices=8)
        {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    text = _text(wanted)
    if min(wanted.values()) < -1 or 0 in wanted.values() or list(wanted.values()).count(-1) > 1:
        raise ValueError(
            f"mesh sizes must be ≥ 1, or −1 on one axis for all remaining devices: {text}"
        )
    fixed = math.prod(size for size in wanted.values() if size != -1)
    sizes = {
        name: max(devices // fixed, 1) if size == -1 else size for name, size in wanted.items()
    }
    total = math.prod(sizes.values())
    partial = total < devices and -1 not in wanted.values() and not all_used and slices == 1
    if (total == devices or partial) and sizes["data"] % slices == 0:
        return sizes
    where = f"{devices} device{'s' * (devices != 1)}"
    if slices > 1:
        where += f" in {slices} slices (data must be a multiple of {slices}: only copies of the "
        where += "model may span slices)"
    fitting = fitting_sizes(wanted, devices=devices, slices=slices)
    shown = "; ".join(_text(one) for one in fitting[:_MOST_SHOWN])
    more = f"; and {len(fitting) - _MOST_SHOWN} more" if len(fitting) > _MOST_SHOWN else ""
    raise ValueError(f"mesh {text} does not fit {where}; these sizes do: {shown}{more}")


def fitting_sizes(
    wanted: Mapping[str, int], *, devices: int, slices: int = 1
) -> list[dict[str, int]]:
    """List all sizes that use every device, those that change the fewest wanted ones first.

    Args:
        wanted: sizes of data, fsdp and tensor; −1 is any.
        devices: how many there are.
        slices: divides data.
    """
    found = [
        {"data": data, "fsdp": fsdp, "tensor": devices // data // fsdp}
        for data in range(slices, devices + 1, slices)
        if devices % data == 0
        for fsdp in range(1, devices // data + 1)
        if devices // data % fsdp == 0
    ]

    def distance(sizes: Mapping[str, int]) -> tuple[int, float]:
        ratios = [
            abs(math.log(size / wanted[name])) for name, size in sizes.items() if wanted[name] > 0
        ]
        return sum(ratio > 0 for ratio in ratios), sum(ratios)

    return sorted(found, key=distance)


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
