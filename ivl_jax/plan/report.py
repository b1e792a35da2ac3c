"""A plan as text and as JSON.

In: plans and their machine. Out: a table per base, or one JSON object.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ivl_jax.config import TrainConfig
from ivl_jax.plan.largest import Largest
from ivl_jax.plan.machines import Machine, pool_fraction
from ivl_jax.plan.remedies import remedies
from ivl_jax.plan.training import TrainingPlan


def table(
    config: TrainConfig,
    machine: Machine,
    plan: TrainingPlan,
    base: str,
    largest: Largest | None = None,
) -> str:
    """One plan for people.

    Args:
        config: of the run.
        machine: where it would run.
        plan: of its step.
        base: the base's path; empty without a base.
        largest: the largest sizes that fit; None: not searched.

    Returns:
        Lines of text.
    """
    step, rows = config.step, config.step.batch_size
    beside = f" with {base}" if base else ""
    head = (
        f"{config.value.path or config.value.init if base else config.base.path}{beside} on "
        f"{machine.name}: {rows} rows of {config.data.max_length:,} tokens in "
        f"{step.micro_batches} micro-batches, step.remat = {plan.remat}"
    )
    parts = {
        "base": plan.base,
        "adapter (float32)" if plan.frozen else "trained network (float32)": plan.value,
        **({"frozen weights under the adapter": plan.frozen} if plan.frozen else {}),
        "optimizer": plan.optimizer,
        "batch": plan.batch,
    }
    if plan.teacher:
        parts["teacher, or the original"] = plan.teacher
    if plan.rollouts is not None:
        parts["caches, while answers are sampled"] = plan.rollouts.caches
    if plan.temporaries is not None:
        parts["temporaries (activations, gradients)"] = plan.temporaries
    lines = [f"  {name:38} {size_text(size)}" for name, size in parts.items()]
    available = f"{size_text(plan.available).strip()}{pool_note(machine)}"
    lines.append(f"  {'peak':38} {size_text(plan.peak)} of {available}")
    lines.append(
        f"  {plan.flops:.3g} FLOPs per step at {machine.flops(step.compute_dtype) / 1e12:.3g} "
        f"TFLOP/s per device ({step.compute_dtype})"
    )
    lines.append(f"  per device {size_text(plan.traffic).strip()} to and from memory{_sent(plan)}")
    limits = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.limits.items())
    lines.append(f"  a step takes at least {plan.seconds:.3g} s ({limits})")
    if plan.rollouts is not None:
        lines.append(f"  sampling its answers takes at least {plan.rollouts.seconds:.3g} s")
    if largest is not None:
        lines.append(f"  the largest that fits: {_largest(config, largest)}")
    if plan.fits:
        lines.append("  fits")
    else:
        lines.append("  does not fit:")
        lines += [f"  - {remedy}" for remedy in remedies(config, machine, plan)]
    return "\n".join([head, "per device:", *lines])


def as_json(
    config: TrainConfig,
    machine: Machine,
    plans: Sequence[TrainingPlan],
    bases: Sequence[str],
    largest: Largest | None = None,
) -> Any:
    """All plans for programs; sizes are bytes per device.

    Args:
        config: of the run.
        machine: where the run would take place.
        plans: one per base.
        bases: the bases' paths.
        largest: the largest sizes that fit; None: not searched.

    Returns:
        An object that `json.dumps` takes.
    """
    return {
        "machine": dataclasses.asdict(machine),
        "fits": all(plan.fits for plan in plans),
        "programs": [
            {
                "base": base,
                **dataclasses.asdict(plan),
                "seconds": plan.seconds,
                "remedies": [] if plan.fits else remedies(config, machine, plan),
            }
            for base, plan in zip(bases, plans, strict=True)
        ],
        "largest": None if largest is None else largest._asdict(),
    }


def pool_note(machine: Machine) -> str:
    """What the available memory is on a GPU; empty on a TPU."""
    if machine.platform != "gpu":
        return ""
    return f", the {pool_fraction():.0%} of its memory that JAX takes"


def _largest(config: TrainConfig, largest: Largest) -> str:
    step, length = config.step, config.data.max_length
    batch = f"{largest.rows} rows of {length:,} tokens in {step.micro_batches} micro-batches"
    longest = f"{step.batch_size} rows of {largest.length:,} tokens"
    return (
        f"{batch if largest.rows else f'no batch of rows of {length:,} tokens'}, or "
        f"{longest if largest.length else f'{step.batch_size} rows of no length'}"
    )


def _sent(plan: TrainingPlan) -> str:
    """What goes to other devices."""
    if plan.sent is None:
        return ""
    kinds = ", ".join(
        f"{kind} {size_text(size).strip()}" for kind, size in plan.sent.items() if size
    )
    return f", {size_text(sum(plan.sent.values())).strip()} to other devices" + (
        f" ({kinds})" if kinds else ""
    )


def size_text(size: float | int) -> str:
    """Bytes as gigabytes, right-aligned."""
    return f"{size / 1e9:8.2f} GB"
