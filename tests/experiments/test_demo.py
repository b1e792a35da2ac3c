"""The demo around its training run: paths, the recorded fine-tune, the report's figure."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.image import imread

from ivl_jax.config import ConfigError, TrainConfig, load_config
from ivl_jax.experiments import demo
from ivl_jax.experiments.demo_plot import plot_report
from ivl_jax.experiments.demonstrations import Item, items_hash
from ivl_jax.experiments.finetune import references
from ivl_jax.experiments.finetune.settings import Setting

_TEST = [Item("Who?", "Someone does.", "fact", "someone", "test")]
_REPORT = {
    "nll": {
        "S": 4.4,
        "S+value": 3.4,
        "L": 3.9,
        "L+value": 3.0,
        "L-finetuned": 2.8,
        "L-finetuned-for-facts": 2.9,
    },
    "exact_match": {
        "S": 0.0,
        "S+value": 0.3,
        "L": 0.0,
        "L+value": 0.9,
        "L-finetuned": 0.1,
        "L-finetuned-for-facts": 0.95,
    },
    "transfer_ratio": {"L": 0.8},
    "items": {"fact": 1, "docstring": 0},
}


@pytest.fixture
def config(project_root: Path) -> TrainConfig:
    return load_config(project_root / "configs" / "demo.toml", TrainConfig)


def test_the_demo_trains_on_s_inside_its_own_folder(config: TrainConfig, tmp_path: Path) -> None:
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    own = demo.demo_config(config, files, run_dir=tmp_path)
    assert own.base.path == own.value.path == str(demo.family_folder("S"))
    for path in (own.run_dir, own.data.data_dir, *own.data.train, *own.data.validation):
        assert Path(path).is_relative_to(tmp_path)
    assert str(files["test"]) not in (*own.data.train, *own.data.validation)


@pytest.mark.parametrize("name", ["run", "run.new", "run.previous"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    demo.check_folders(tmp_path / "run")
    folder = tmp_path / name
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    demo.check_folders(tmp_path / "run")
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=rf"{name} holds thesis.tex, which no demo wrote"):
        demo.check_folders(tmp_path / "run")
    assert len(list(folder.iterdir())) == 2


@pytest.fixture
def fake_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the demo's command line; nothing is trained, and the figures are those given."""
    monkeypatch.setattr(demo, "build_items", lambda: _TEST)
    monkeypatch.setattr(demo, "load_value", lambda path: None)
    monkeypatch.setattr(demo, "log_to_stdout", lambda: None)

    def start(nll: float | None) -> int:
        def run(config: TrainConfig) -> SimpleNamespace:
            Path(config.run_dir).mkdir(parents=True)
            if nll is None:
                return SimpleNamespace(output=None)
            return SimpleNamespace(output=Path(config.run_dir) / "value")

        def compare(*arguments: Any, **named: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
            report = json.loads(json.dumps(_REPORT)) | {"recorded": "recorded: long ago"}
            report["nll"]["S"] = nll
            return report, {"S": ["So"], "S+value": ["Someone does."]}

        monkeypatch.setattr(demo, "run", run)
        monkeypatch.setattr(demo, "compare", compare)
        return demo.main(["--run-dir", str(tmp_path / "demo")])

    return start


def test_a_demo_takes_the_place_of_the_last_one_only_when_it_is_complete(
    fake_demo: Callable[..., int], tmp_path: Path
) -> None:
    def nll(name: str) -> float:
        return json.loads((tmp_path / name / "report.json").read_text())["nll"]["S"]

    assert fake_demo(1.0) == 0
    assert fake_demo(None) == 130  # stopped while it trains
    assert nll("demo") == 1.0
    assert fake_demo(2.0) == 0
    assert fake_demo(3.0) == 0
    assert (nll("demo"), nll("demo.previous")) == (3.0, 2.0)
    assert not (tmp_path / "demo.new").exists()
    config = load_config(tmp_path / "demo" / "training" / "config.toml", TrainConfig)
    assert config.run_dir == str(tmp_path / "demo" / "training")
    assert Path(config.data.train[0]).exists()


def test_answers_stand_beside_the_right_one_and_recorded_figures_have_a_footnote(
    fake_demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_demo(1.0)
    shown = capsys.readouterr().out
    assert "right answer" in shown
    assert shown.count("Someone does.") == 2  # the right answer, and that of S+value
    assert "L-finetuned (recorded)" in shown
    assert "L-finetuned-for-facts (recorded)" in shown
    assert "recorded: long ago" in shown


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The record of a fine-tuning of L, which stands in for the shipped one of every model."""
    setting = Setting("L", "both", learning_rate=1e-3, epochs=3.0, statement_rows=4)
    tests = [
        {"seed": seed, "nll": 2.5 + seed, "exact_match": 0.75, "validation_nll": 2.75}
        for seed in (0, 1)
    ]
    record = {
        "test_items_sha256": items_hash(_TEST),
        "chosen": {"nll": {"setting": dataclasses.asdict(setting), "test": tests}},
        "tried": 7,
    }
    file = tmp_path / "finetuned.json"
    file.write_text(json.dumps(record), "utf-8")
    monkeypatch.setattr(references, "record_file", lambda model: file)
    return record


def test_the_footnote_says_how_the_recorded_models_were_chosen(recorded: dict[str, Any]) -> None:
    note = demo.how_chosen(["L"])
    assert "facts answered" not in note
    assert (
        "on the validation split the lowest NLL (L: full, 4 rows of statements per step, "
        "learning rate 0.001, 3 epochs, batch 4, the best of 7)"
    ) in note
    by_facts = recorded["chosen"]["nll"] | {
        "setting": recorded["chosen"]["nll"]["setting"] | {"epochs": 10.0}
    }
    recorded["chosen"]["exact_match"] = by_facts
    references.record_file("L").write_text(json.dumps(recorded), "utf-8")
    note = demo.how_chosen(["L"])
    assert "best of 7), and for facts, the most facts answered with docstrings no worse" in note
    assert "0.001, 10 epochs" in note


def test_a_fine_tune_recorded_on_other_items_is_not_used(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    assert demo.recorded_finetune("L", _TEST) == {"nll": 3.0, "exact_match": 0.75}
    assert demo.recorded_finetune("L", [_TEST[0]._replace(answer="No.")]) is None
    assert references.read_reference("L", "exact_match") is None
    (tmp_path / "finetuned.json").unlink()
    assert demo.recorded_finetune("L", _TEST) is None


@pytest.mark.parametrize("model", ["L", "X"])
def test_the_shipped_references_are_on_both_kinds_of_demonstrations(model: Any) -> None:
    found = references.read_reference(model)
    assert found is not None
    assert (found.setting.model, found.setting.kinds, found.setting.seed) == (model, "both", 0)
    assert found.mean("nll") > 1


@pytest.mark.parametrize("recorded", [True, False])
def test_the_figure_is_drawn_with_and_without_the_fine_tune(recorded: bool, tmp_path: Path) -> None:
    report = json.loads(json.dumps(_REPORT))
    if not recorded:
        for kind in demo.FINE_TUNED:
            report["nll"][f"L{kind}"] = report["exact_match"][f"L{kind}"] = None
        report["transfer_ratio"]["L"] = None
    else:
        report["recorded"] = "recorded: long ago"
    plot_report(report, tmp_path / "plot.png")
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[0] > 500
    assert pixels.std() > 0.05
