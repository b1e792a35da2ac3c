"""A plan of decoding as text and as JSON.

In: the plan, what was asked, and the machine. Out: a table, or an object for `json.dumps`.
"""

import dataclasses
from typing import Any

from ivl_jax.plan.compiled import Compiled
from ivl_jax.plan.decode_flags import DecodeConfig
from ivl_jax.plan.decoding import DecodingPlan
from ivl_jax.plan.machines import Machine
from ivl_jax.plan.report import pool_note, size_text


def decode_table(config: DecodeConfig, machine: Machine, plan: DecodingPlan, values: str) -> str:
    """The plan for people.

    Args:
        config: what is decoded.
        machine: where it would be.
        plan: of its programs.
        values: names of the value networks; empty: the base alone.

    Returns:
        Lines of text.
    """
    model = config.model
    kind = f"{model.dtype}, base in int8" if model.int8_base else model.dtype
    padding = f", {plan.rows - config.batch} of padding" if plan.rows > config.batch else ""
    head = (
        f"{model.base}{f' with {values}' if values else ''} on {machine.name}: {config.batch} "
        f"row(s) of {config.context:,} tokens{padding}, {kind}"
    )
    parts = {
        "base": plan.base,
        "value networks": plan.values,
        "caches": plan.caches,
        "temporaries of generating": plan.chunk.temporaries,
        "temporaries of reading prompts": plan.prefill.temporaries,
        "peak of generating": plan.chunk.peak,
        "peak of reading prompts": plan.prefill.peak,
    }
    lines = [f"  {name:38} {size_text(size)}" for name, size in parts.items() if size is not None]
    lines.append(f"  {'available':38} {size_text(plan.available)}{pool_note(machine)}")
    lines.append(f"  {'read per step of all rows':38} {size_text(plan.bytes_per_step)}")
    lines.append(
        f"  at most {plan.tokens_per_second:,.0f} tokens/s at {machine.bandwidth / 1e9:,.0f} GB/s "
        "of memory bandwidth"
    )
    lines.append("  " + ("fits" if plan.fits else _remedy(config, plan)))
    return "\n".join([head, "per device:", *lines])


def decode_json(config: DecodeConfig, machine: Machine, plan: DecodingPlan) -> Any:
    """The plan for programs; sizes are bytes per device."""
    programs = {"prefill": plan.prefill, "chunk": plan.chunk}
    return {
        "machine": dataclasses.asdict(machine),
        "batch": config.batch,
        "context": config.context,
        "fits": plan.fits,
        "peak": plan.peak,
        **{
            field.name: getattr(plan, field.name)
            for field in dataclasses.fields(plan)
            if field.name not in programs
        },
        **{name: compiled._asdict() for name, compiled in programs.items()},
    }


def _remedy(config: DecodeConfig, plan: DecodingPlan) -> str:
    held = plan.base + plan.values
    ways = []
    if held + plan.caches <= plan.available and config.batch > 1:
        ways.append(f"lower --batch from {config.batch}")
    if plan.caches and held <= plan.available:
        ways.append("lower --context")
    if not config.model.int8_base:
        ways.append("add --int8-base")
    if config.model.dtype == "float32":
        ways.append("use --dtype bfloat16")
    programs: dict[str, Compiled] = {"generating": plan.chunk, "reading prompts": plan.prefill}
    failing = " and ".join(name for name, compiled in programs.items() if not compiled.fits)
    return f"does not fit ({failing}): {', '.join([*ways, 'use more devices'])}"
