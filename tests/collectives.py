"""What tests look for in a compiled program: its sums over devices, and how deep in loops."""

import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_SUM = re.compile(r" = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(")


def sums_over_devices(text: str) -> list[tuple[int, int]]:
    """(loops around it, numbers) of every all-reduce and reduce-scatter of a compiled program."""
    bodies, entry = _computations(text)
    return list(_found(bodies, entry, 0))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            name = begins.group(2)
            bodies[name] = []
            entry = name if begins.group(1) else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _found(bodies: dict[str, list[str]], name: str, depth: int) -> Iterator[tuple[int, int]]:
    for line in bodies.get(name, ()):
        if result := _SUM.search(line):
            shapes = re.findall(r"\[([\d,]*)\]", result.group(1))
            yield depth, sum(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes)
        inside = re.findall(r"\bbody=%?([\w.-]+)", line)
        called = re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", line)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for one in inside:
            yield from _found(bodies, one, depth + 1)
        for one in called:
            yield from _found(bodies, one, depth)
