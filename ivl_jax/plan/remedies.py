"""What to change where a training run does not fit, with estimates of what each change saves.

In: a config, a machine and its plan. Out: sentences, the cheapest change first. Parameters shrink
with the devices that split them, temporaries with the rows that a device has at once; the compiler
has the last word, so a changed run should be planned again.
"""

from ivl_jax.config import TrainConfig
from ivl_jax.plan.machines import MACHINES, Machine, sizes_of
from ivl_jax.plan.training import TrainingPlan

# Of a GPU's memory; the rest is for the driver's own needs and for libraries such as cuDNN.
_LARGEST_POOL = 0.95


def remedies(config: TrainConfig, machine: Machine, plan: TrainingPlan) -> list[str]:
    """What could make a run fit.

    Args:
        config: of the run.
        machine: on which it does not fit.
        plan: of its step there.

    Returns:
        Changes, each on its own; several may be needed together.
    """
    found = []
    if machine.platform == "gpu" and plan.peak <= _LARGEST_POOL * MACHINES[machine.name].memory:
        found.append(
            f"set XLA_PYTHON_CLIENT_MEM_FRACTION={_LARGEST_POOL} in the environment of the run "
            "(and of the plan): it would fit"
        )
    held = plan.base + plan.frozen + plan.value + plan.optimizer + plan.batch + plan.teacher
    if held <= plan.available:
        found += _fewer_temporaries(config, plan, room=plan.available - held)
    found += _smaller_parameters(config, machine, plan)
    larger = _larger_machine(config, machine, plan)
    if larger is not None:
        found.append(f"use a larger machine: {larger.name}")
    return found or [f"use devices with more memory: no {machine.family} is large enough"]


def _fewer_temporaries(config: TrainConfig, plan: TrainingPlan, *, room: int) -> list[str]:
    """Changes of the step, where parameters and batch leave this much room."""
    step, found = config.step, []
    if plan.remat != "full":
        found.append('set step.remat = "full": layers keep only their inputs for the backward pass')
    if not step.scan_layers:
        found.append("set step.scan_layers = true: layers share one body and its temporaries")
    temporaries = plan.peak - (plan.available - room)
    possible = [
        count
        for count in range(step.micro_batches + 1, step.batch_size // plan.ways + 1)
        if step.batch_size % (count * plan.ways) == 0
    ]
    enough = [count for count in possible if temporaries * step.micro_batches / count <= room]
    if possible:
        count = (enough or possible[-1:])[0]
        rows = step.batch_size // (count * plan.ways)
        found.append(
            f"set step.micro_batches = {count} instead of {step.micro_batches}: {rows} row(s) per "
            f"device at a time{'' if enough else ', which may not be enough'}"
        )
    else:
        found.append("shorten data.max_length: a device already has one row at a time")
    return found


def _smaller_parameters(config: TrainConfig, machine: Machine, plan: TrainingPlan) -> list[str]:
    found = []
    stored = {base.param_dtype for base in config.all_bases} if plan.base else set()
    if "float32" in stored:
        found.append(f'set base.param_dtype = "bfloat16": saves about {_size(plan.base / 2)}')
    elif "bfloat16" in stored:
        found.append(f'set base.param_dtype = "int8": saves about {_size(plan.base / 2)}')
    whole = config.method == "value" and config.value.init == "pretrained"
    if whole and not config.value.lora.rank and not found:
        # Parameters and moments become frozen parameters, and an adapter's that are small.
        found.append(
            "set value.lora.rank = 8: only an adapter of the value network is trained, which saves "
            f"about {_size(plan.optimizer)}"
        )
    mesh = config.mesh
    split = 1 if mesh.fsdp == -1 else mesh.fsdp * max(mesh.tensor, 1)
    if mesh.fsdp != -1 and mesh.tensor != -1 and split < machine.devices:
        held = plan.base + plan.frozen + plan.value + plan.optimizer
        saved = held * (1 - split / machine.devices)
        found.append(
            f"set mesh.data = 1 and mesh.fsdp = -1: parameters and moments are split over all "
            f"{machine.devices} devices, which saves about {_size(saved)}"
        )
    return found


def _larger_machine(config: TrainConfig, machine: Machine, plan: TrainingPlan) -> Machine | None:
    """The smallest of the family on which it should fit: parameters and rows are split further."""
    mesh, step = config.mesh, config.step
    if -1 not in (mesh.data, mesh.fsdp, mesh.tensor):
        return None  # it would use no more devices
    held = plan.base + plan.frozen + plan.value + plan.optimizer + plan.batch
    rows = step.batch_size // step.micro_batches
    for larger in sizes_of(machine.family):
        growth = larger.devices / machine.devices
        if growth <= 1 or rows % (plan.ways * growth):
            continue
        temporaries = max(plan.peak - held, 0) / growth
        if held / growth + temporaries <= plan.available:
            return larger
    return None


def _size(size: float | int) -> str:
    return f"{size / 1e9:.1f} GB"
