"""The largest sizes that fit are found with few compilations."""

import dataclasses

import pytest

from ivl_jax.config import GrpoConfig
from ivl_jax.plan import largest as module
from ivl_jax.plan.largest import Peak, find_largest, largest_that_fits
from ivl_jax.plan.machines import Machine


@pytest.mark.parametrize("first", [1, 7, 30, 200])
@pytest.mark.parametrize("power", [1.0, 1.2])
def test_the_largest_is_next_to_the_limit(first, power):
    tried = []

    def measure(size):
        tried.append(size)
        peak = int(1000 + 10 * size**power)
        return Peak(size, peak, peak <= 2000)

    size = largest_that_fits(measure, measure(first), available=2000, step=1, limit=10_000)
    exact = max(size for size in range(1, 1000) if int(1000 + 10 * size**power) <= 2000)
    assert 0.9 * exact <= size <= exact
    assert size in tried  # by its own compilation
    assert len(tried) <= 7


def test_sizes_are_multiples_and_have_a_limit():
    def measure(size):
        return Peak(size, size, size <= 1000)

    assert largest_that_fits(measure, measure(100), available=1000, step=128, limit=5000) == 896
    assert largest_that_fits(measure, measure(100), available=1000, step=1, limit=300) == 300


def test_nothing_may_fit():
    def measure(size):
        return Peak(size, 2000 + size, False)

    assert largest_that_fits(measure, measure(8), available=1000, step=1, limit=100) == 0


def test_a_runs_batch_and_length_are_searched_apart(config, plan, monkeypatch):
    machine = Machine("cpu-8", "cpu:8", 8, 1000, 1e12, 1e12, 1e11)
    seen = []

    def plan_training(config, machine):
        rows, length = config.step.batch_size, config.data.max_length
        seen.append((rows, length, config.data.beyond_context))
        peak = 100 + rows * length // 16
        return [dataclasses.replace(plan, peak=peak, fits=peak <= machine.memory)]

    monkeypatch.setattr(module, "plan_training", plan_training)
    found = find_largest(config, machine, plan_training(config, machine))
    assert found == (896, 896)  # 2 micro-batches of 56 rows on each of 8 devices
    assert all(rows == 16 or length == 16 for rows, length, _ in seen)
    assert all(beyond for _, length, beyond in seen if length != 16)


def test_rows_of_a_run_that_samples_are_whole_groups(config, plan, monkeypatch):
    machine = Machine("cpu-8", "cpu:8", 8, 1000, 1e12, 1e12, 1e11)
    seen = set()

    def plan_training(config, machine):
        seen.add(config.step.batch_size)
        peak = 100 + config.step.batch_size
        return [dataclasses.replace(plan, peak=peak, fits=peak <= machine.memory)]

    monkeypatch.setattr(module, "plan_training", plan_training)
    step = dataclasses.replace(config.step, batch_size=48)
    sampled = dataclasses.replace(
        config, objective="grpo", grpo=GrpoConfig(group_size=6), step=step
    )
    found = find_largest(sampled, machine, plan_training(sampled, machine))
    assert found.rows == 864  # of at most 900, the largest multiple of 2 × 8 rows and of a group
    assert all(rows % 48 == 0 for rows in seen)
