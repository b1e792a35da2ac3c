"""The post-training study's plan: names are keys, and what a run needs is made before it."""

from ivl_jax.experiments.post_training_plan import (
    MODELS,
    SEEDS,
    Measurement,
    Run,
    alone,
    folded,
    measurements,
    value_on,
)


def test_no_two_measurements_share_a_name_and_the_value_networks_come_first() -> None:
    planned = list(measurements(SEEDS, SEEDS))
    names = [one.name for one in planned]
    assert len(names) == len(set(names)) == 60
    assert planned[: len(MODELS)] == [Measurement(model) for model in MODELS]
    assert names.index(value_on("X", "dpo", 2).name) < names.index(alone("L", "sft", 0).name)


def test_every_field_of_a_run_is_in_its_name() -> None:
    run = Run("sft", "S")
    changed = [
        run._replace(kind="dpo"),
        run._replace(model="L"),
        run._replace(alone=True),
        run._replace(seed=1),
    ]
    assert len({one.name for one in (run, *changed)}) == len(Run._fields) + 1


def test_preferences_and_rewards_start_from_demonstrations_of_the_same_model() -> None:
    assert Run("grpo", "L", alone=True, seed=2).start == Run("sft", "L", alone=True, seed=2)
    assert Run("dpo", "S").start == Run("sft", "S")
    assert Run("sft", "S").start is None


def test_distillation_learns_from_rewarded_models_of_the_same_seed() -> None:
    assert Run("distil", "L", seed=1).teacher == Run("grpo", "L", alone=True, seed=1)
    run = folded(1).run
    assert run is not None
    assert run.teacher == Run("grpo", "S", seed=1)
    assert run.start is None
