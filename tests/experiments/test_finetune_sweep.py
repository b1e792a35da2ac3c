"""The sweep of references: each run once, what is recorded, and how the page shows it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments.demonstrations import Item, items_hash
from ivl_jax.experiments.finetune import references
from ivl_jax.experiments.finetune import sweep as sweep_module
from ivl_jax.experiments.finetune.plan import STAGES, Stage
from ivl_jax.experiments.finetune.report import RECORD, references_section
from ivl_jax.experiments.finetune.run import Fit
from ivl_jax.experiments.finetune.settings import Point, Setting
from ivl_jax.experiments.finetune.sweep import Sweep
from ivl_jax.experiments.finetune_sweep import publish_runs, run_stage

_ITEMS = [
    Item("Who?", "A.", "fact", "a", "train"),
    Item("Where?", "B.", "fact", "b", "validation"),
    Item("When?", "C.", "fact", "c", "test"),
]
_STAGE = Stage("S", "facts", "full")


@pytest.fixture
def sweep(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[Setting]]:
    """Makes sweeps in one work directory whose runs take no time; and the runs that were made."""
    made: list[Setting] = []
    config = load_config(project_root / "configs" / "demo.toml", TrainConfig)

    def fine_tune(config: TrainConfig, setting: Setting, items: list[Item], **named: Any) -> Fit:
        made.append(setting)
        for criterion in ("nll", "exact_match"):
            (named["run_dir"] / f"best_{criterion}").mkdir(parents=True, exist_ok=True)
        off = abs(setting.learning_rate - 1e-3)
        curve = [
            Point(10, 2 + off, 0.3 - off, 2 + off, None),
            Point(28, 1 + off, 0.6 - off, 1 + off, None),
            Point(40, 3.0, 0.5 - off, 3.0, None),
        ]
        return Fit(curve, [1.0, 0.5, 0.1], 20.0)

    figures = {"nll": 1.25, "fact_nll": 1.5, "docstring_nll": 1.0, "exact_match": 0.5}
    monkeypatch.setattr(sweep_module, "fine_tune", fine_tune)
    monkeypatch.setattr(sweep_module, "load_language_model", lambda path: path)
    monkeypatch.setattr(sweep_module, "compose", lambda model: model)
    monkeypatch.setattr(sweep_module, "answered", lambda model, items: None)
    monkeypatch.setattr(sweep_module, "figures_on", lambda *_: dict(figures))
    return lambda items=_ITEMS: Sweep(tmp_path / "work", config, list(items)), made


def test_a_stage_is_run_once_and_a_stopped_one_goes_on(sweep: Any, tmp_path: Path) -> None:
    make, made = sweep
    run_stage(make(), _STAGE, docs=tmp_path)
    assert [one.learning_rate for one in made] == [3e-4, 1e-3, 3e-3]
    before = len(made)
    run_stage(make(), _STAGE, docs=tmp_path)
    assert len(made) == before
    # A killed run has left no record: it is made again.
    first = next((tmp_path / "work" / "runs").glob("*/record.json"))
    first.unlink()
    run_stage(make(), _STAGE, docs=tmp_path)
    assert len(made) == before + 1


def test_runs_on_other_demonstrations_do_not_count(sweep: Any, tmp_path: Path) -> None:
    make, made = sweep
    run_stage(make(), _STAGE, docs=tmp_path)
    other = [*_ITEMS[:2], _ITEMS[0]._replace(question="Which?")]
    assert make(other).tried == {}
    assert len(make([*_ITEMS, Item("f?", "D.", "docstring", "d", "train")]).tried) == len(made)


def test_the_record_has_every_run_and_the_chosen_ones(sweep: Any, tmp_path: Path) -> None:
    make, made = sweep
    run_stage(make(), _STAGE, docs=tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    assert {run["setting"]["learning_rate"] for run in record["runs"]} == {3e-4, 1e-3, 3e-3}
    assert all(len(run["key"]) == 16 and len(run["curve"]) == 3 for run in record["runs"])
    assert record["chosen"] == []  # no study of S is on facts alone

    by_stage = dataclasses.replace(made[0], model="L", learning_rate=1e-3)
    one = make()
    for rate in (3e-4, 1e-3, 3e-3):
        one.run(dataclasses.replace(by_stage, learning_rate=rate))
    chosen = one.record()["chosen"]
    assert [each["criterion"] for each in chosen] == ["nll", "exact_match"]
    assert {each["setting"]["learning_rate"] for each in chosen} == {1e-3}
    assert {(each["step"], each["finished"]) for each in chosen} == {(28, False)}
    assert chosen[0]["test"] == []
    one.test(dataclasses.replace(by_stage, learning_rate=1e-3), "nll")
    assert [test["seed"] for test in one.record()["chosen"][0]["test"]] == [0]


def test_a_published_record_is_gone_on_from_if_it_is_of_the_same_settings(
    sweep: Any, tmp_path: Path
) -> None:
    make, made = sweep
    stage = Stage("L", "facts", "full")
    run_stage(make(), stage, docs=tmp_path)
    before = len(made)
    shutil.rmtree(tmp_path / "work")

    adopting = make()
    adopting.adopt(tmp_path / RECORD, "S")
    assert adopting.tried == {}
    adopting.adopt(tmp_path / RECORD, "L")
    run_stage(adopting, stage, docs=tmp_path)
    assert len(made) == before
    assert {file.name for file in (tmp_path / "work" / "runs").glob("*/test_*")} == {
        "test_nll.json",
        "test_exact_match.json",
    }

    record = json.loads((tmp_path / RECORD).read_text())
    record["runs"][0]["key"] = "0" * 16  # another config's
    (tmp_path / RECORD).write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "work")
    other = make()
    other.adopt(tmp_path / RECORD, "L")
    assert len(other.tried) == before - 1
    other.adopt(tmp_path / "none.json", "L")


def test_a_run_of_another_config_is_not_taken_for_todays(sweep: Any, tmp_path: Path) -> None:
    make, made = sweep
    run_stage(make(), _STAGE, docs=tmp_path)
    file = next((tmp_path / "work" / "runs").glob("*/record.json"))
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"key": "0" * 16}))
    assert len(make().tried) == len(made) - 1


def test_figures_of_other_test_items_are_measured_again(sweep: Any, tmp_path: Path) -> None:
    make, _ = sweep
    stage = Stage("L", "facts", "full")
    run_stage(make(), stage, docs=tmp_path)
    tests = [test for one in make().record()["chosen"] for test in one["test"]]
    assert len(tests) == 2
    other = [*_ITEMS, Item("f?", "D.", "docstring", "d", "test")]
    assert [one["test"] for one in make(other).record()["chosen"]] == [[], []]


def test_what_is_published_of_other_models_stays(sweep: Any, tmp_path: Path) -> None:
    make, made = sweep
    file = tmp_path / RECORD
    publish_runs(make(), file)
    assert not file.exists()  # nothing has been run
    run_stage(make(), _STAGE, docs=tmp_path)
    before = json.loads(file.read_text())
    shutil.rmtree(tmp_path / "work")
    publish_runs(make(), file)
    assert json.loads(file.read_text()) == before
    only_l = make()
    only_l.run(dataclasses.replace(made[0], model="L"))
    publish_runs(only_l, file)
    record = json.loads(file.read_text())
    assert [run for run in record["runs"] if run["setting"]["model"] == "S"] == before["runs"]
    assert len(record["runs"]) == len(before["runs"]) + 1


def test_the_page_shows_the_choice_its_bracket_and_what_was_tried(
    sweep: Any, tmp_path: Path
) -> None:
    make, _ = sweep
    assert references_section(tmp_path / RECORD) == ""
    one = make()
    start = Setting("L", "facts", learning_rate=1e-3, epochs=10.0)
    for changed in ({}, {"learning_rate": 3e-4}, {"learning_rate": 3e-3}, {"statement_rows": 4}):
        one.run(dataclasses.replace(start, **changed))
    one.run(dataclasses.replace(start, seed=1))
    for seed in (0, 1):
        for criterion in ("nll", "exact_match"):
            one.test(dataclasses.replace(start, seed=seed), criterion)
    (tmp_path / RECORD).write_text(json.dumps(one.record()))
    text = references_section(tmp_path / RECORD)
    assert "(5 runs)" in text
    assert "Not finished yet, so its best may still change: L on facts alone." in text
    assert (
        "| L | facts alone | NLL | full | 0.001 | 0.0003 and 0.003 | 10 | 70% | 1.000 | 60.0% | "
        "1.500 ± 0.000 | 1.000 ± 0.000 | 1.250 ± 0.000 | 50.0% ± 0.0% |"
    ) in text
    assert (
        "| L | facts alone | full, 4 rows of statements per step | 1 | 1.000 (0.001, 10 epochs) | "
        "60.0% (0.001, 10 epochs) |"
    ) in text
    assert "| L | facts alone | full | 3 | 1.000 (0.001, 10 epochs) |" in text


def test_a_reference_is_recorded_when_the_search_has_ended(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _ = sweep
    one = make()
    stages = [stage for stage in STAGES if (stage.model, stage.kinds) == ("S", "both")]
    for stage in stages:
        assert one.reference("S") is None
        run_stage(one, stage, docs=tmp_path)
    file = tmp_path / "finetuned_S.json"
    file.write_text(json.dumps(one.reference("S")))
    monkeypatch.setattr(references, "record_file", lambda model: file)

    test_items = items_hash([_ITEMS[2]])
    for criterion, step_nll in (("nll", 1.0), ("exact_match", 1.0)):
        found = references.read_reference("S", criterion, items_sha256=test_items)
        assert found.setting.learning_rate == 1e-3
        assert set(found.tests) == {0, 1, 2}
        assert found.mean("nll") == 1.25
        assert found.tests[2]["validation_nll"] == pytest.approx(step_nll)
        alike = [setting for setting in one.tried if not setting.seed]
        assert found.tried == len(alike) >= 5
    assert references.read_reference("S", items_sha256="other") is None


def test_an_estimate_is_the_mean_time_of_runs_alike(sweep: Any) -> None:
    make, _ = sweep
    one = make()
    start = Setting("L", "facts", learning_rate=1e-3, epochs=10.0)
    assert one.seconds_per_epoch(start) is None
    one.run(start)
    assert one.seconds_per_epoch(dataclasses.replace(start, epochs=30.0)) == pytest.approx(2.0)
    said = one.estimate()
    assert re.fullmatch(
        r"in all \d+ that can be named by now, about \d+ min and \d+ of unknown length", said
    )
