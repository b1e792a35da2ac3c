"""Programs compiled by the TPU's own compiler, where it is installed."""

import dataclasses

import jax
import pytest

from ivl_jax.commands.train import read_flags
from ivl_jax.plan.devices import describe_devices
from ivl_jax.plan.machines import MACHINES, find_machine
from ivl_jax.plan.remedies import remedies
from ivl_jax.plan.training import plan_training

pytest.importorskip("libtpu", reason="the extra `plan-tpu` is not installed")


@pytest.fixture
def debug(project_root, monkeypatch):
    """The debug config, read in the clone's folder, with the precision that runs have."""
    monkeypatch.chdir(project_root)
    with jax.default_matmul_precision("default"):
        yield read_flags(["--config", "configs/debug.toml"])


@pytest.mark.parametrize("name", [name for name in MACHINES if MACHINES[name].platform == "tpu"])
def test_every_slice_has_the_devices_that_its_name_says(name):
    machine = MACHINES[name]
    devices = describe_devices(machine)
    assert len(devices) == machine.devices
    assert {device.platform for device in devices} == {"tpu"}


def test_the_debug_configs_step_compiles_for_a_slice(debug, caplog):
    machine = find_machine("v5e-4")
    scanned = dataclasses.replace(debug, step=dataclasses.replace(debug.step, scan_layers=True))
    (plan,) = plan_training(scanned, machine)
    assert plan.fits
    held = plan.base + plan.value + plan.optimizer + plan.batch
    assert held < plan.peak < plan.available
    assert plan.temporaries is not None
    assert plan.sent is not None
    assert plan.peak == pytest.approx(held + plan.temporaries, rel=0.2)
    # Each device sends its share of every gathered matrix to three others, in bfloat16: those of
    # the base once, of the value at least once. Gradients are reduced in float32.
    assert 3 * plan.value <= plan.sent["all-gather"] <= 5 * plan.value
    assert plan.sent["all-reduce"] == pytest.approx(6 * plan.value, rel=0.1)
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
