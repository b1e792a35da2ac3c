"""Counts the bytes that a compiled program sends between devices.

In: the text of a compiled program (`compiled.as_text()`). Out: bytes that each device sends, by
kind of collective. A collective within a loop counts once per iteration.

With an array of n bytes (gathered, reduced or exchanged) and groups of g devices, each device sends
at least n · (g − 1) / g in an all-gather, a reduce-scatter or an all-to-all, twice that in an
all-reduce, and n in a collective-permute.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .* \{$")
# name = type opcode(operands), attributes. The type of a tuple is in parentheses and has spaces.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) "
    r"(?P<opcode>[a-z][\w-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+(?:[a-z]\w*)?)\[(?P<shape>[\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{|true_computation=)%?([\w.-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LISTED = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"\breplica_groups=\[(?:\d+,)*(\d+)\]<=")
_ON_MESH = re.compile(r"\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_USED_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collectives(NamedTuple):
    """What a program sends between devices."""

    sent: Mapping[str, int]
    """Kind → bytes that each device sends in one run of the program."""
    unknown_loops: int
    """Collectives in loops whose length the text omits; they are counted as one iteration."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sent.values())


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


_Computations = Mapping[str, Sequence[_Instruction]]


def count_collectives(text: str, *, devices: int) -> Collectives:
    """Count what each device sends in one run of a program.

    Args:
        text: the compiled program in HLO's text form.
        devices: the size of a collective's group where it names none.

    Returns:
        Bytes by kind.

    Example:
        >>> text = '''
        ... ENTRY %main (x: bf16[8]) -> bf16[32] {
        ...   %x = bf16[8]{0} parameter(0)
        ...   ROOT %y = bf16[32]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
        ... }
        ... '''
        >>> count_collectives(text, devices=4)  # 64 bytes, of which 16 are the device's own
        Collectives(sent={'all-gather': 48}, unknown_loops=0)
    """
    computations, entry = _read(text)
    sent: dict[str, int] = {}
    unknown = 0
    for found, kind, times, known in _walk(computations, entry):
        sent[kind] = sent.get(kind, 0) + times * _sent_by(found, kind, devices)
        unknown += not known
    return Collectives(sent, unknown)


def _read(text: str) -> tuple[_Computations, str]:
    """(computation → instructions, name of the entry)."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found["name"], [])
            entry = found["name"] if found["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(**found.groupdict()))
    return computations, entry


def _walk(
    computations: _Computations, name: str, times: int = 1, *, known: bool = True
) -> Iterator[tuple[_Instruction, str, int, bool]]:
    """Every collective that runs: (it, its kind, how often, whether loops' lengths are known)."""
    instructions = computations.get(name, ())
    started = " ".join(one.rest for one in instructions if '"AsyncCollectiveStart"' in one.rest)
    for one in instructions:
        kind = one.opcode.removesuffix("-start")
        if kind in _KINDS:
            # The TPU compiler writes a collective that runs beside other work three times: where it
            # starts, in the fusion that it runs beside, and where it ends.
            if 'chain_id="' in one.rest and not re.search(rf"%{re.escape(one.name)}\b", started):
                continue
            yield one, kind, times, known
            continue
        inner, inner_known = times, known
        if one.opcode == "while":
            trips = _trips(computations, one)
            inner, inner_known = times * (trips or 1), known and trips is not None
        # Of a conditional the first branch: those of our programs do not differ in collectives.
        for called in (*_CALLED.findall(one.rest), *_BRANCHES.findall(one.rest)):
            yield from _walk(computations, called, inner, known=inner_known)


def _trips(computations: _Computations, loop: _Instruction) -> int | None:
    """How often a loop runs; None: the text omits it.

    The TPU compiler leaves it to the condition, `i < n`: JAX's loops count up from 0.
    """
    if found := _TRIPS.search(loop.rest):
        return int(found[1])
    condition = _CONDITION.search(loop.rest)
    tests = computations.get(condition[1], ()) if condition else ()
    constants = {one.name: one.rest.partition(")")[0] for one in tests if one.opcode == "constant"}
    for one in tests:
        if one.opcode == "compare" and "direction=LT" in one.rest:
            limit = constants.get(one.rest.partition(")")[0].rpartition("%")[2], "")
            return int(limit) if limit.isdecimal() else None
    return None


def _sent_by(collective: _Instruction, kind: str, devices: int) -> int:
    group = _group_size(collective.rest) or devices
    arrays = [_bytes(found) for found in _ARRAY.finditer(collective.type)]
    if collective.opcode in ("all-gather-start", "reduce-scatter-start"):
        arrays = arrays[len(arrays) // 2 :]  # the type lists operands, then results
    elif collective.opcode == "collective-permute-start":
        arrays = arrays[1:2]
    size = sum(arrays)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= group  # the result is one share
    return size * (group - 1) // group * (2 if kind == "all-reduce" else 1)


def _group_size(attributes: str) -> int:
    """Devices per group; 0: all of them."""
    if found := _ON_MESH.search(attributes):
        sizes = {name: int(size) for name, size in _MESH_AXIS.findall(found[1])}
        used = _USED_AXIS.findall(found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    if found := _COUNTED.search(attributes):
        return int(found[1])
    if found := _LISTED.search(attributes):
        return len(found[1].split(","))
    return 0


def _bytes(array: re.Match[str]) -> int:
    shape = [int(size.removeprefix("<=")) for size in array["shape"].split(",") if size]
    width = re.search(r"\d+", array["dtype"])
    bits = int(width[0]) if width else 8  # a bool takes a byte
    return math.prod(shape) * bits // 8
