"""What an experiment has trained and measured is not made again."""

import json
from types import SimpleNamespace

import pytest

from ivl_jax.config import BaseConfig, DataConfig, TrainConfig
from ivl_jax.experiments.kept_results import (
    InterruptedTrainingError,
    adopt_measurements,
    kept_record,
    measure_once,
    publish,
    split_measured,
    train_once,
)


def test_a_training_is_made_once_and_an_interrupted_one_resumes(tmp_path):
    run_dir = tmp_path / "trained" / "one"
    output, resumed = run_dir / "value", []
    config = TrainConfig(
        run_dir=str(run_dir), base=BaseConfig("none"), data=DataConfig(train=("none",))
    )

    def run(wanted):
        resumed.append(wanted.resume)
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.toml").touch()
        if len(resumed) > 1:
            output.mkdir()
        return SimpleNamespace(output=output if len(resumed) > 1 else None)

    def again():
        return train_once("one", run_dir, output, config=lambda: config, run=run)

    with pytest.raises(InterruptedTrainingError, match="one was stopped: run the command again"):
        again()
    assert again() == again() == output
    assert resumed == [False, True]
    assert not (run_dir / "checkpoints").exists()


def test_a_record_about_other_items_or_of_other_settings_is_none(tmp_path):
    file = tmp_path / "one.json"
    wanted = {"items_sha256": "a", "settings_sha256": "b"}
    assert kept_record(file, wanted) is None
    file.write_text(json.dumps(wanted | {"nll": 1.0}))
    assert kept_record(file, wanted) == wanted | {"nll": 1.0}
    for key in wanted:
        assert kept_record(file, wanted | {key: "c"}) is None
    file.write_text(json.dumps({"items_sha256": "a", "nll": 1.0}))
    assert kept_record(file, wanted) is None


def test_a_study_goes_on_from_a_published_record(tmp_path):
    wanted, folder = {"items_sha256": "a"}, tmp_path / "measured"
    adopt_measurements(tmp_path / "none.json", folder)
    assert not folder.exists()
    published = tmp_path / "study.json"
    measured = {name: wanted | {"nll": float(number)} for number, name in enumerate(("x", "y"))}
    published.write_text(json.dumps({"measured": measured, "missing": ["z"]}))
    folder.mkdir()
    (folder / "y.json").write_text(json.dumps(wanted | {"nll": 3.0}))
    adopt_measurements(published, folder)
    assert kept_record(folder / "x.json", wanted) == measured["x"]
    assert kept_record(folder / "y.json", wanted) == wanted | {"nll": 3.0}
    assert not (folder / "z.json").exists()


def test_a_record_without_a_measurement_leaves_the_published_one(tmp_path):
    file = tmp_path / "docs" / "study.json"
    full = split_measured({"x": {"nll": 1.0}, "y": None})
    assert full == {"measured": {"x": {"nll": 1.0}}, "missing": ["y"]}
    publish(split_measured({"x": None}), file)
    assert file.parent.is_dir()
    assert not file.exists()
    publish(full, file)
    publish(split_measured({"x": None}), file)
    assert json.loads(file.read_text()) == full


def test_a_measurement_is_made_once_and_again_for_other_settings(tmp_path):
    file, made = tmp_path / "new" / "x.json", []

    def measure():
        made.append(len(made))
        return {"nll": float(len(made))}

    for wanted, nll in [({"of": "a"}, 1.0), ({"of": "a"}, 1.0), ({"of": "b"}, 2.0)]:
        assert measure_once("x", file, wanted, measure) == {"nll": nll, **wanted}
    assert made == [0, 1]
