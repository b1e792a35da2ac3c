"""A plan as text and as JSON.

In: plans and their machine. Out: a table per base, or one JSON object.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ivl_jax.config import TrainConfig
from ivl_jax.plan.machines import MACHINES, Machine, pool_fraction
from ivl_jax.plan.training import TrainingPlan

# Of a GPU's memory; the rest is for the driver's own needs and for libraries such as cuDNN.
_LARGEST_POOL = 0.95


def table(config: TrainConfig, machine: Machine, plan: TrainingPlan, base: str) -> str:
    """One plan for people.

    Args:
        config: of the run.
        machine: where it would run.
        plan: of its step.
        base: the base's path; empty without a base.

    Returns:
        Lines of text.
    """
    step, rows = config.step, config.step.batch_size
    beside = f" with {base}" if base else ""
    head = (
        f"{config.value.path or config.value.init if base else config.base.path}{beside} on "
        f"{machine.name}: {rows} rows of {config.data.max_length:,} tokens in "
        f"{step.micro_batches} micro-batches"
    )
    parts = {
        "base": plan.base,
        "trained network (float32)": plan.value,
        "optimizer": plan.optimizer,
        "batch": plan.batch,
    }
    if plan.temporaries is not None:
        parts["temporaries (activations, gradients)"] = plan.temporaries
    lines = [f"  {name:38} {size_text(size)}" for name, size in parts.items()]
    available = f"{size_text(plan.available).strip()}{pool_note(machine)}"
    lines.append(f"  {'peak':38} {size_text(plan.peak)} of {available}")
    dtype = step.compute_dtype
    lines.append(
        f"  {plan.flops:.3g} FLOPs per step: at least {plan.seconds:.3g} s at the chips' peak "
        f"rate in {dtype} ({machine.flops(dtype) / 1e12:.3g} TFLOP/s each)"
    )
    lines.append("  " + ("fits" if plan.fits else _remedy(config, machine, plan)))
    return "\n".join([head, "per device:", *lines])


def as_json(machine: Machine, plans: Sequence[TrainingPlan], bases: Sequence[str]) -> Any:
    """All plans for programs; sizes are bytes per device.

    Args:
        machine: where the run would take place.
        plans: one per base.
        bases: the bases' paths.

    Returns:
        An object that `json.dumps` takes.
    """
    return {
        "machine": dataclasses.asdict(machine),
        "programs": [
            {"base": base, "fits": plan.fits, **dataclasses.asdict(plan)}
            for base, plan in zip(bases, plans, strict=True)
        ],
    }


def pool_note(machine: Machine) -> str:
    """What the available memory is on a GPU; empty on a TPU."""
    if machine.platform != "gpu":
        return ""
    return f", the {pool_fraction():.0%} of its memory that JAX takes"


def _remedy(config: TrainConfig, machine: Machine, plan: TrainingPlan) -> str:
    if machine.platform == "gpu" and plan.peak <= _LARGEST_POOL * MACHINES[machine.name].memory:
        return (
            f"does not fit, but would with XLA_PYTHON_CLIENT_MEM_FRACTION={_LARGEST_POOL} in the "
            "environment of the run (and of the plan)"
        )
    step = config.step
    held = plan.base + plan.value + plan.optimizer
    if held > plan.available:
        return (
            "does not fit: the parameters and moments alone exceed a device; shard them over more "
            "devices (mesh.fsdp, mesh.tensor)"
        )
    ways = []
    if not step.remat:
        ways.append("set step.remat = true")
    if not step.scan_layers:
        ways.append("set step.scan_layers = true")
    if step.batch_size > step.micro_batches:
        ways.append(f"raise step.micro_batches from {step.micro_batches}")
    return f"does not fit: {', '.join([*ways, 'use more devices'])}"


def size_text(size: int) -> str:
    """Bytes as gigabytes, right-aligned."""
    return f"{size / 1e9:8.2f} GB"
