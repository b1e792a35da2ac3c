"""A varied base: what each dialogue draws; meshes, micro-batches and resumes draw alike."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ivl_jax.config import (
    AugmentationConfig,
    BaseConfig,
    ConfigError,
    DistilConfig,
    PenaltyConfig,
    RowsConfig,
)
from ivl_jax.sharding import make_mesh, place_batch, single_device_mesh
from ivl_jax.training.augmentation import augment
from ivl_jax.training.loop import run
from ivl_jax.training.setup import check_names
from ivl_jax.training.step import make_eval_step, split_micro_batches
from tests.training.runs import assert_same_run, crash_and_resume, records
from tests.training.test_cached_states import assert_close_runs
from tests.training.test_step import Run, leaves
from tests.training.tiny import make_batch, on_device

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")

BOTH = AugmentationConfig(base_temperature=2.0, base_dropout=0.3)


def scales(options, *, micro_batches=1, seed=0):
    batch = on_device(split_micro_batches(make_batch(rows=256), micro_batches))
    found = augment(options, batch, jax.random.key(seed)).base_scale
    return np.asarray(found).reshape(256, -1)


def of_dialogues(options):
    """One number per dialogue, since it is the same all along."""
    segments = make_batch(rows=256).segment_ids
    rows = list(zip(scales(options), segments, strict=True))
    return np.array([np.unique(row[ids == n]).item() for row, ids in rows for n in (1, 2)])


def test_every_dialogue_draws_its_own_temperature_log_uniformly():
    logs = np.log2(of_dialogues(AugmentationConfig(base_temperature=2.0)))
    assert len(np.unique(logs)) == len(logs) == 512
    counts, _ = np.histogram(logs, 4, (-1, 1))
    assert counts.sum() == 512
    assert counts == pytest.approx(np.full(4, 128), abs=40)


def test_a_share_of_the_dialogues_is_learned_without_the_base():
    drawn = of_dialogues(AugmentationConfig(base_dropout=0.3))
    assert set(drawn) == {0.0, 1.0}
    assert np.mean(drawn == 0) == pytest.approx(0.3, abs=0.06)


def test_the_draws_are_those_of_the_key_whatever_the_micro_batches():
    whole = scales(BOTH)
    np.testing.assert_array_equal(scales(BOTH, micro_batches=4), whole)
    assert not np.array_equal(scales(BOTH, seed=1), whole)


def test_micro_batches_and_meshes_draw_alike_and_steps_anew():
    plain = Run(single_device_mesh())
    whole = Run(single_device_mesh(), augmentation=BOTH)
    history = whole.train(steps=2)
    assert abs(history[0]["nll"] - plain.train(steps=1)[0]["nll"]) > 1e-3
    for mesh, parts in ((single_device_mesh(), 2), (make_mesh(data=2, fsdp=2, tensor=2), 1)):
        other = Run(mesh, augmentation=BOTH)
        for one, many in zip(history, other.train(micro_batches=parts, steps=2), strict=True):
            assert many == pytest.approx(one, rel=2e-5)
    again = Run(single_device_mesh(), augmentation=BOTH)
    again.state = again.state._replace(step=again.state.step + 1)
    assert again.train(steps=1)[0]["nll"] != history[0]["nll"]


def test_an_evaluation_sees_the_base_as_it_is():
    sums = []
    for options in (None, BOTH):
        made = Run(single_device_mesh(), augmentation=options)
        evaluate = make_eval_step(
            made.loss,
            shardings=made.shardings.params,
            base_shardings=made.base_at,
            mesh=made.mesh,
        )
        sums.append(evaluate(made.state.params, made.base, place_batch(make_batch(), made.mesh)))
    assert leaves(sums[0]) == leaves(sums[1])


@pytest.mark.slow
def test_a_crash_changes_nothing_and_cached_states_give_the_same_run(
    tiny_config, tmp_path, monkeypatch
):
    config = replace(
        tiny_config,
        base=BaseConfig(path=tiny_config.base.path),
        augmentation=BOTH,
        penalty=PenaltyConfig(schedule="linear_decay"),
        data=replace(tiny_config.data, data_dir=str(tmp_path / "data")),
    )
    whole = run(config)
    steps = [line for line in records(whole.run_dir) if "loss" in line]
    weights = [line["penalty_weight"] for line in steps]
    assert weights == pytest.approx([(6 - number) / 6 for number in range(6)])
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    assert_same_run(crash_and_resume(monkeypatch, run, stopped), whole)
    cached = replace(config.base, cache_states=True)
    assert_close_runs(run(replace(config, base=cached, run_dir=str(tmp_path / "cached"))), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "distil", "distil": DistilConfig(teacher="t")},
        {"objective": "dpo", "preference_rows": True},
    ],
    ids=lambda change: change["objective"],
)
def test_objectives_that_compare_with_the_base_refuse_a_varied_one(tiny_config, change):
    if change.pop("preference_rows", False):
        rows = RowsConfig(format="preference")
        change["data"] = replace(tiny_config.data, rows=rows)
    config = replace(tiny_config, **change)
    check_names(config)
    expected = rf"augmentation.base_temperature = 2.0.*objective = .{config.objective}.*or set"
    with pytest.raises(ConfigError, match=expected):
        check_names(replace(config, augmentation=BOTH))
