"""The study's trainings: their configs, and what they start from; nothing is trained here."""

from pathlib import Path

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config.train import check_train_config
from ivl_jax.experiments import post_training_lab
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.facts import Split
from ivl_jax.experiments.post_training_lab import PostTrainingLaboratory, Settings
from ivl_jax.experiments.post_training_plan import Run, measurements

SPLITS: list[Split] = ["train"] * 60 + ["validation"] * 4 + ["test"] * 4
ITEMS = [
    Item(f"Question {i}?", f"Answer {i}.", "fact", f"person {i}", split)
    for i, split in enumerate(SPLITS)
]
SETTINGS = Settings(share=0.5, epochs=7.0, samples=2, alone_rates={"grpo": 1e-5})


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PostTrainingLaboratory:
    """One whose trainings have been done: their folders are only named."""
    lab = PostTrainingLaboratory(tmp_path, ITEMS, SETTINGS)

    def output(run: Run) -> Path:
        return tmp_path / "trained" / run.name / ("model" if run.alone else "value")

    monkeypatch.setattr(lab, "train", output)
    monkeypatch.setattr(post_training_lab, "export_value", lambda *_: None)
    monkeypatch.setattr(
        post_training_lab, "write_pairs", lambda path, *_, **__: path.write_text("", "utf-8")
    )
    return lab


def test_every_run_of_the_plan_has_a_complete_config(laboratory, tmp_path) -> None:
    runs = {one.run for one in measurements() if one.run is not None}
    for run in runs:
        config = laboratory.config_of(run, tmp_path / run.name)
        check_train_config(config)
        assert config.objective == {"fold": "distil"}.get(run.kind, run.kind)
        assert config.method == ("sft" if run.alone else "value")
        assert config.penalty.weight == 0 or not run.alone
        assert (config.seed, config.resume) == (run.seed, False)


def test_runs_start_from_demonstrations_and_read_their_own_pairs(laboratory, tmp_path) -> None:
    dpo = laboratory.config_of(Run("dpo", "S", seed=1), tmp_path / "run")
    assert dpo.base.path == str(family_folder("S"))
    assert dpo.value.path == str(tmp_path / "trained/sft_S_seed1/exported")
    assert dpo.data.train == (str(tmp_path / "pairs/train_seed1.jsonl"),)
    alone = laboratory.config_of(Run("grpo", "X", alone=True), tmp_path / "run")
    assert alone.base.path == str(tmp_path / "trained/sft_X_alone_seed0/model")
    assert alone.optimizer.learning_rate == 1e-5
    sft = laboratory.config_of(Run("sft", "S"), tmp_path / "run")
    assert (sft.value.path, sft.step.epochs) == (str(family_folder("S")), 7.0)
    few = Path(sft.data.train[0]).read_text(encoding="utf-8").count("\n")
    assert 0 < few < 60


def test_teachers_are_what_the_plan_says(laboratory, tmp_path) -> None:
    tuned = laboratory.config_of(Run("distil", "L"), tmp_path / "run")
    assert tuned.distil.teacher == str(tmp_path / "trained/grpo_L_alone_seed0/model")
    assert tuned.distil.values == ()
    assert tuned.value.path == str(family_folder("S"))
    fold = laboratory.config_of(Run("fold", "L", alone=True), tmp_path / "run")
    assert fold.distil.teacher == fold.base.path == str(family_folder("L"))
    assert fold.distil.values == (str(tmp_path / "trained/grpo_S_seed0/value"),)


def test_what_has_been_measured_is_not_measured_again(laboratory, monkeypatch) -> None:
    (measurement, *_) = measurements()
    monkeypatch.setattr(laboratory, "_models", lambda _: (None, None))
    monkeypatch.setattr(post_training_lab, "answers", lambda *_, **__: ["Answer 64."] * 4)
    monkeypatch.setattr(
        post_training_lab, "score_answers", lambda *_: type("Scores", (), {"nll": 1.5, "kl": 0.25})
    )
    record = laboratory.measure(measurement)
    assert (record["exact_match"], record["nll"], record["kl"]) == (0.25, 1.5, 0.25)
    monkeypatch.setattr(laboratory, "_models", None)
    assert laboratory.measure(measurement) == record
