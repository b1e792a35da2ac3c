"""The post-training study's plan: names are keys, and what a run needs is made before it."""

from ivl_jax.experiments.post_training.plan import (
    ALONE_RATES,
    KINDS,
    SEEDS,
    Measurement,
    Run,
    alone,
    folded,
    measurements,
    sweeps,
    swept,
    value_on,
)


def test_no_two_measurements_share_a_name_and_the_targets_come_first() -> None:
    planned = list(measurements(SEEDS))
    names = [one.name for one in planned]
    assert len(names) == len(set(names))
    assert planned[:2] == [Measurement("S"), Measurement("L")]
    last_target = max(names.index(alone("L", kind, seed).name) for kind in KINDS for seed in SEEDS)
    assert names.index(value_on("L", "grpo", 2).name) < names.index(alone("L", "sft", 0).name)
    assert last_target < names.index(folded(0).name) < names.index(Measurement("X").name)


def test_every_field_of_a_run_is_in_its_name() -> None:
    run = Run("sft", "S")
    changed = [
        run._replace(kind="dpo"),
        run._replace(model="L"),
        run._replace(alone=True),
        run._replace(seed=1),
        run._replace(rate=1e-3),
    ]
    assert len({one.name for one in (run, *changed)}) == len(Run._fields) + 1
    one = Measurement("S", run)
    changed = [one._replace(base="L"), one._replace(run=None), one._replace(split="validation")]
    assert len({each.name for each in (one, *changed)}) == len(Measurement._fields) + 1


def test_preferences_and_rewards_start_from_demonstrations() -> None:
    assert Run("grpo", "L", alone=True, seed=2).start == Run("sft", "L", alone=True, seed=2)
    assert Run("dpo", "S", seed=1).start == Run("sft", "S", seed=1)
    assert Run("dpo", "L", seed=1).start == Run("sft", "S", seed=1)  # the borrowed one's start
    assert Run("sft", "S").start is None


def test_distillation_learns_from_rewarded_models_of_the_same_seed() -> None:
    assert Run("distil", "L", seed=1).teacher == Run("grpo", "L", alone=True, seed=1)
    run = folded(1).run
    assert run is not None
    assert run.teacher == Run("grpo", "S", seed=1)
    assert run.start is None


def test_rates_of_models_trained_alone_are_swept_once_and_before_they_are_used() -> None:
    run = Run("grpo", "X", alone=True, seed=2)
    assert [one.rate for one in run.sweep] == list(ALONE_RATES["grpo"])
    assert {one._replace(rate=None) for one in run.sweep} == {Run("grpo", "L", alone=True)}
    assert not run._replace(rate=1e-4).sweep
    assert not Run("grpo", "S").sweep
    assert set(sweeps(run)) == {*swept("grpo"), *swept("sft")}
    planned = list(measurements(SEEDS))
    for measurement in planned:
        if measurement.run is not None:
            before = planned[: planned.index(measurement)]
            assert set(sweeps(measurement.run)) <= set(before), measurement.name


def test_at_least_three_rates_are_tried_for_each_kind() -> None:
    assert all(len(set(ALONE_RATES[kind])) >= 3 for kind in KINDS)
