"""Programs compiled by the TPU's own compiler, where it is installed."""

import dataclasses

import pytest

from ivl_jax.commands.train import read_flags
from ivl_jax.plan.devices import describe_devices
from ivl_jax.plan.machines import MACHINES, find_machine
from ivl_jax.plan.remedies import remedies
from ivl_jax.plan.training import plan_training

pytest.importorskip("libtpu", reason="the extra `plan-tpu` is not installed")


@pytest.fixture
def debug(project_root, monkeypatch):
    """The debug config, read in the clone's folder."""
    monkeypatch.chdir(project_root)
    return read_flags(["--config", "configs/debug.toml"])


@pytest.mark.parametrize("name", [name for name in MACHINES if MACHINES[name].platform == "tpu"])
def test_every_slice_has_the_devices_that_its_name_says(name):
    machine = MACHINES[name]
    devices = describe_devices(machine)
    assert len(devices) == machine.devices
    assert {device.platform for device in devices} == {"tpu"}


def test_the_debug_configs_step_compiles_for_a_slice(debug, caplog):
    machine = find_machine("v5e-4")
    (plan,) = plan_training(debug, machine)
    assert plan.fits
    held = plan.base + plan.value + plan.optimizer + plan.batch
    assert held < plan.peak < plan.available
    assert plan.temporaries is not None
    assert plan.sent is not None
    assert plan.peak == pytest.approx(held + plan.temporaries, rel=0.2)
    # Gathered in bfloat16 or float32 over the four devices of fsdp, base and value; and gradients.
    assert 1.5 * plan.value < plan.sent["all-gather"] < 20 * plan.value
    assert sum(plan.sent.values()) > plan.sent["all-gather"]
    assert "loops of unknown length" not in caplog.text
    assert plan.limits["interconnect"] > 0


def test_a_batch_that_is_too_large_is_refused_with_its_remedy(debug):
    machine = find_machine("v5e-4")
    step = dataclasses.replace(debug.step, batch_size=1 << 17)
    config = dataclasses.replace(debug, step=step)
    (plan,) = plan_training(config, machine)
    assert not plan.fits
    assert plan.peak > plan.available
    assert "step.micro_batches = " in "\n".join(remedies(config, machine, plan))
