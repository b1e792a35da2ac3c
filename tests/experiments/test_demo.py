"""The demo around its training run: paths, the recorded fine-tune, the report's figure."""

import dataclasses
import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments import demo
from ivl_jax.experiments.demo_plot import plot_report
from ivl_jax.experiments.demonstrations import Item, items_hash
from ivl_jax.experiments.finetune_sweep import Setting, finetune_config

_TEST = [Item("Who?", "Someone does.", "fact", "someone", "test")]
_REPORT = {
    "nll": {"S": 4.4, "S+value": 3.4, "L": 3.9, "L+value": 3.0, "L-finetuned": 2.8},
    "exact_match": {"S": 0.0, "S+value": 0.3, "L": 0.0, "L+value": 0.9, "L-finetuned": 0.95},
    "transfer_ratio": {"L": 0.8},
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


def test_only_what_a_demo_wrote_is_removed_before_the_next(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    demo.remove_earlier_run(run_dir)
    (run_dir / "training").mkdir(parents=True)
    (run_dir / "report.json").write_text("{}")
    (run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match=r"holds thesis.tex, which no demo wrote"):
        demo.remove_earlier_run(run_dir)
    assert len(list(run_dir.iterdir())) == 3
    (run_dir / "thesis.tex").unlink()
    demo.remove_earlier_run(run_dir)
    assert not run_dir.exists()


def test_the_fine_tune_differs_from_the_demo_in_what_is_trained_only(
    config: TrainConfig, tmp_path: Path
) -> None:
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    own = demo.demo_config(config, files, run_dir=tmp_path)
    tuned = finetune_config(
        config,
        files,
        model=demo.family_folder("L"),
        run_dir=tmp_path / "run",
        setting=Setting(learning_rate=1e-4, epochs=2.0, batch_size=8),
    )
    assert tuned.method == "sft"
    assert tuned.base.path == str(demo.family_folder("L"))
    assert dataclasses.replace(tuned.data, data_dir="") == dataclasses.replace(
        own.data, data_dir=""
    )
    assert (tuned.optimizer.learning_rate, tuned.step.epochs) == (1e-4, 2.0)
    assert tuned.step.batch_size == 8


def test_a_fine_tune_recorded_on_other_items_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "finetuned.json"
    monkeypatch.setattr(demo, "record_file", lambda model: record)
    assert demo.recorded_finetune("L", _TEST) is None
    figures = {"nll": 2.5, "exact_match": 0.9}
    record.write_text(json.dumps(figures | {"test_items_sha256": items_hash(_TEST)}), "utf-8")
    assert demo.recorded_finetune("L", _TEST) == figures
    assert demo.recorded_finetune("L", [_TEST[0]._replace(answer="No.")]) is None


@pytest.mark.parametrize("recorded", [True, False])
def test_the_figure_is_drawn_with_and_without_the_fine_tune(recorded: bool, tmp_path: Path) -> None:
    report = json.loads(json.dumps(_REPORT))
    if not recorded:
        report["nll"]["L-finetuned"] = report["exact_match"]["L-finetuned"] = None
        report["transfer_ratio"]["L"] = None
    plot_report(report, tmp_path / "plot.png")
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[0] > 500
    assert pixels.std() > 0.05
