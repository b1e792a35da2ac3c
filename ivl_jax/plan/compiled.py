"""Compiles a lowered program for a machine that is not attached, and reads what it takes.

In: a machine and a program lowered for its devices. Out: `Compiled`. A TPU's compiler refuses a
program that does not fit; a GPU's compiles it, and its peak tells.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from ivl_jax.plan.collectives import count_collectives
from ivl_jax.plan.cudnn_without_driver import cudnn_for
from ivl_jax.plan.gpu_chips import GPU_CHIPS
from ivl_jax.plan.gpu_devices import compiler_options, ptxas_on_path
from ivl_jax.plan.machines import Machine
from ivl_jax.plan.result_cache import compilation_key, find_record, keep_record
from ivl_jax.target_platform import tracing_for

logger = logging.getLogger(__name__)

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
    sent: Mapping[str, int] | None = None
    """Kind of collective → bytes that each device sends; None if the compiler refused."""
    counted_once: int = 0
    """Collectives in loops of unknown length: more bytes are sent."""


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


def warn_of_dtype(machine: Machine, dtype: str) -> None:
    """Warn of a dtype that a GPU does not compute in; XLA converts to float32 and back.

    Args:
        machine: where a program would run.
        dtype: what it computes in.
    """
    if machine.platform == "gpu" and dtype == "bfloat16":
        chip = GPU_CHIPS[machine.topology]
        if not chip.has_bfloat16:
            logger.warning(
                "%s has no bfloat16, which is converted to float32 and back: plan with float32 "
                "(or, for decoding, float16)",
                chip.name,
            )


def compile_program(
    lowered: Any, machine: Machine, *, held: int, one_pass: bool = False
) -> Compiled:
    """Compile a program, unless a record of it is on disk; nothing runs.

    Args:
        lowered: from `jax.jit(…).lower` within `lowering_for`.
        machine: where it would run.
        held: bytes of its arguments per device.
        one_pass: its loop of unknown length is meant to count once, as in a chunk of decoding.

    Returns:
        What it takes.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    options = compiler_options() if machine.platform == "gpu" else {}
    key = compilation_key(lowered.as_text(), (repr(machine), repr(options), str(held)))
    compiled = _recorded(find_record(key))
    if compiled is None:
        compiled = _compile(lowered, machine, options, held)
        keep_record(key, compiled._asdict())
    if compiled.counted_once and not one_pass:
        logger.warning(
            "%d collectives are in loops of unknown length and counted once: more bytes are sent",
            compiled.counted_once,
        )
    return compiled


def _recorded(record: Mapping[str, Any] | None) -> Compiled | None:
    """A record as it was kept; None for one with other fields."""
    if record is None or set(record) != set(Compiled._fields):
        return None
    return Compiled(**record)


def _compile(lowered: Any, machine: Machine, options: Any, held: int) -> Compiled:
    try:
        if machine.platform == "gpu":
            with ptxas_on_path():
                compiled = lowered.compile(compiler_options=options)
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
    collectives = count_collectives(compiled.as_text(), devices=machine.devices)
    # libtpu reports no temporaries for some programs whose peak contains them.
    temporaries = stats.temp_size_in_bytes or max(peak - held, 0)
    return Compiled(fits, temporaries, peak, dict(collectives.sent), collectives.unknown_loops)


def _parsed(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
