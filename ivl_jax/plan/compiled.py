"""Compiles a lowered program for a machine that is not attached, and reads what it takes.

In: a machine and a program lowered for its devices. Out: `Compiled`. A TPU's compiler refuses a
program that does not fit; a GPU's compiles it, and its peak tells.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from ivl_jax.plan.cudnn_without_driver import cudnn_for
from ivl_jax.plan.gpu_chips import GPU_CHIPS
from ivl_jax.plan.gpu_devices import compiler_options, ptxas_on_path
from ivl_jax.plan.machines import Machine
from ivl_jax.target_platform import tracing_for

# The TPU compiler refuses a program in one of two ways: by its peak, or by its temporaries alone.
_PEAK = re.compile(r"Used ([\d.]+)([MGT]) of [\d.]+[MGT] hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([MGT])\) exceeds available HBM")
_UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Compiled(NamedTuple):
    """What a program takes on each device."""

    fits: bool
    """Whether its peak is within what the machine has."""
    temporaries: int | None
    """Bytes beside arguments and results; None if the compiler's refusal omits them."""
    peak: int
    """Bytes, arguments included."""


@contextlib.contextmanager
def lowering_for(machine: Machine) -> Iterator[None]:
    """Trace and lower for a machine, kernels included.

    Args:
        machine: where the programs would run.
    """
    with contextlib.ExitStack() as stack:
        if machine.platform == "gpu":
            stack.enter_context(cudnn_for(GPU_CHIPS[machine.topology].capability))
        yield stack.enter_context(tracing_for(machine.platform))


def compile_program(lowered: Any, machine: Machine, *, held: int) -> Compiled:
    """Compile a program; nothing runs.

    Args:
        lowered: from `jax.jit(…).lower` within `lowering_for`.
        machine: where it would run.
        held: bytes of its arguments per device.

    Returns:
        What it takes.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    try:
        if machine.platform == "gpu":
            with ptxas_on_path():
                compiled = lowered.compile(compiler_options=compiler_options())
        else:
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _PEAK.search(str(error)):
            return Compiled(False, None, _parsed(*found.groups()))
        if found := _TEMPORARIES.search(str(error)):
            temporaries = _parsed(*found.groups())
            return Compiled(False, temporaries, held + temporaries)
        raise
    stats = compiled.memory_analysis()
    peak = stats.peak_memory_in_bytes
    fits = machine.platform != "gpu" or peak <= machine.memory
    return Compiled(fits, stats.temp_size_in_bytes, peak)


def _parsed(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
