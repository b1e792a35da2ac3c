"""Where a run does not fit, concrete changes are named."""

import dataclasses

import pytest

from ivl_jax.config import LoraConfig
from ivl_jax.plan.machines import find_machine
from ivl_jax.plan.remedies import remedies

GB = 10**9


def found(config, plan, machine="v5e-8", *, step=(), **sizes):
    """The changes for a plan of these sizes, in GB, as one text."""
    changed = dataclasses.replace(config, step=dataclasses.replace(config.step, **dict(step)))
    machine = find_machine(machine)
    whole = {name: int(size * GB) for name, size in sizes.items()}
    plan = dataclasses.replace(plan, **whole, available=machine.memory, ways=8)
    return "\n".join(remedies(changed, machine, plan))


def test_more_micro_batches_are_those_that_leave_enough_room(config, plan):
    text = found(config, plan, base=2, value=1, optimizer=2, peak=35, step={"batch_size": 64})
    # 30 GB of temporaries in 2 micro-batches, 11.9 GB of room: 4 would take 15, 8 take 7.5.
    assert "step.micro_batches = 8 instead of 2: 1 row(s) per device at a time" in text
    assert "not be enough" not in text
    assert 'set step.remat = "full"' in text
    assert "set step.scan_layers = true" in text


def test_the_most_micro_batches_may_not_be_enough(config, plan):
    text = found(config, plan, base=2, value=1, optimizer=2, peak=85, step={"batch_size": 64})
    assert "step.micro_batches = 8" in text
    assert "which may not be enough" in text


def test_a_single_row_per_device_can_only_be_shorter(config, plan):
    done = {"scan_layers": True, "batch_size": 16}  # with remat = "auto", as chosen
    plan = dataclasses.replace(plan, remat="full")
    text = found(config, plan, base=2, value=1, optimizer=2, peak=25, step=done)
    assert "shorten data.max_length" in text
    assert "step." not in text


@pytest.mark.parametrize(
    ("stored", "smaller"), [("float32", "bfloat16"), ("bfloat16", "int8"), ("int8", None)]
)
def test_a_base_is_stored_smaller_where_it_can_be(config, plan, stored, smaller):
    base = dataclasses.replace(config.base, param_dtype=stored)
    config = dataclasses.replace(config, base=base)
    text = found(config, plan, base=20, value=1, optimizer=2, peak=25)
    assert ("base.param_dtype" in text) == (smaller is not None)
    if smaller:
        assert f'base.param_dtype = "{smaller}": saves about 10.0 GB' in text
    assert "micro_batches" not in text  # temporaries are not what is too large


def test_replicated_parameters_can_be_split(config, plan):
    mesh = dataclasses.replace(config.mesh, data=4, fsdp=2)
    text = found(
        dataclasses.replace(config, mesh=mesh), plan, base=8, value=4, optimizer=8, peak=21
    )
    assert "mesh.data = 1 and mesh.fsdp = -1" in text
    assert "saves about 15.0 GB" in text
    text = found(config, plan, base=8, value=4, optimizer=8, peak=21)
    assert ("mesh.fsdp" in text) == (config.mesh.fsdp not in (-1, 8))


def test_a_larger_slice_is_the_smallest_that_splits_enough(config, plan):
    text = found(config, plan, base=20, value=10, optimizer=20, peak=51, step={"batch_size": 1024})
    assert "use a larger machine: v5e-32" in text  # 51 GB on 8 devices are 12.8 GB on 32
    text = found(config, plan, "v5e-256", base=2000, value=10, optimizer=20, peak=2100)
    assert "larger machine" not in text


def test_a_larger_machine_divides_the_rows_of_a_micro_batch(config, plan):
    step = {"batch_size": 32, "micro_batches": 2}
    sizes = {"base": 10, "value": 5, "optimizer": 10, "peak": 26}
    assert "use a larger machine: v5e-16" in found(config, plan, step=step, **sizes)
    sizes |= {"base": 40, "peak": 56}  # too much for 16 devices; 16 rows do not divide over 32
    assert "larger machine" not in found(config, plan, step=step, **sizes)
    fixed = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=8))
    assert "larger machine" not in found(fixed, plan, base=10, value=5, optimizer=10, peak=26)


def test_something_is_always_said(config, plan):
    base = dataclasses.replace(config.base, param_dtype="int8")
    mesh = dataclasses.replace(config.mesh, fsdp=-1, data=1)
    value = dataclasses.replace(config.value, lora=LoraConfig(rank=8))
    config = dataclasses.replace(config, base=base, value=value, mesh=mesh)
    text = found(config, plan, "v5e-256", base=2000, value=10, optimizer=20, peak=2100)
    assert text == "use devices with more memory: no v5e is large enough"
