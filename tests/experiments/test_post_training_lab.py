"""The study's trainings: their configs, and what they start from; nothing is trained here."""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config.train import check_train_config
from ivl_jax.experiments import settings_key as settings_key_module
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.family.facts import Split as FactSplit
from ivl_jax.experiments.family.facts import fact_questions, questions_about_strangers
from ivl_jax.experiments.post_training import lab as post_training_lab
from ivl_jax.experiments.post_training.configs import Settings
from ivl_jax.experiments.post_training.lab import PostTrainingLaboratory
from ivl_jax.experiments.post_training.plan import (
    ALONE_RATES,
    KINDS,
    Measurement,
    Run,
    Split,
    alone,
    measurements,
    swept,
    value_on,
)
from ivl_jax.experiments.post_training.study import record_of
from ivl_jax.experiments.settings_key import _changed, settings_key

SPLITS: list[FactSplit] = [
    *(["train"] * 60),
    *(["validation"] * 4),
    *(["test"] * 4),
]
ITEMS = [
    Item(f"Question {i}?", f"Answer {i}.", "fact", f"person {i}", split)
    for i, split in enumerate(SPLITS)
]
SETTINGS = Settings(share=0.5, epochs=7.0, samples=2, grpo_steps=11)


class Made(PostTrainingLaboratory):
    """One whose trainings are made at once, and whose models answer as told."""

    def __init__(self, work_dir: Path, settings: Settings = SETTINGS) -> None:
        super().__init__(work_dir, ITEMS, settings)
        self.scored: list[str] = []

    def train(self, run: Run) -> Path:
        return self._output(run)

    def _models(self, measurement: Measurement) -> Any:
        self.scored.append(measurement.name)
        return measurement, measurement

    def _on_pairs(self, scorer: Any, split: Split, seed: int) -> dict[str, float]:
        # The second rate of a sweep is the best one.
        rate, rates = scorer.run.rate, ALONE_RATES.get(scorer.run.kind, ())
        return {"pair_accuracy": float(rates.index(rate) == 1) if rate in rates else 0.5}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A laboratory that trains nothing."""

    def answers(measurement, items, **_):
        run = measurement.run
        is_second = run is not None and run.rate in ALONE_RATES.get(run.kind, ())[1:2]
        return [item.answer if is_second else "" for item in items]

    monkeypatch.setattr(post_training_lab, "answers", answers)
    scores = SimpleNamespace(nll=1.5, kl=0.25)
    monkeypatch.setattr(post_training_lab, "score_answers", lambda *_: scores)
    return Made(tmp_path)


def test_every_run_of_the_plan_has_a_complete_config(made) -> None:
    runs = {one.run for one in measurements() if one.run is not None}
    for run in runs:
        config = made.config_of(run)
        check_train_config(config)
        assert config.objective == {"fold": "distil"}.get(run.kind, run.kind)
        assert config.method == ("sft" if run.alone else "value")
        assert config.penalty.weight == 0 or not run.alone
        assert (config.seed, config.resume) == (run.seed, False)
        assert config.logging.checkpoint_every <= 50
        if run.alone and run.kind in KINDS:
            assert config.optimizer.learning_rate == (run.rate or ALONE_RATES[run.kind][1])
    folders = {made.config_of(run).run_dir for run in runs}
    seed_0 = sum(run.model == "L" and run.sweep != () and run.seed == 0 for run in runs)
    assert len(folders) == len(runs) - seed_0  # the best of a sweep is not trained again


def test_runs_start_from_demonstrations_and_read_their_own_pairs(made, tmp_path) -> None:
    dpo = made.config_of(Run("dpo", "S", seed=1))
    sft = made.config_of(Run("sft", "S", seed=1))
    assert dpo.base.path == str(family_folder("S"))
    assert dpo.value.path == f"{sft.run_dir}/exported"
    assert Path(dpo.data.train[0]).name == f"pairs_train-2-of-{Path(sft.run_dir).name}.jsonl"
    tuned = made.config_of(Run("grpo", "X", alone=True, rate=1e-5))
    sft_x = made.config_of(Run("sft", "X", alone=True))
    assert tuned.base.path == f"{sft_x.run_dir}/model"
    assert (tuned.optimizer.learning_rate, tuned.step.max_steps) == (1e-5, 11)
    beside_l = made.config_of(Run("grpo", "L", seed=1))
    assert beside_l.base.path == str(family_folder("L"))
    assert beside_l.value.path == f"{sft.run_dir}/exported"
    assert (sft.value.path, sft.step.epochs) == (str(family_folder("S")), 7.0)
    few = Path(sft.data.train[0]).read_text(encoding="utf-8").count("\n")
    assert 0 < few < 60
    other = made.config_of(Run("sft", "S", seed=2))
    assert other.data.train != sft.data.train, "each seed draws its own demonstrations"
    assert other.data.validation != sft.data.validation


def test_teachers_and_their_own_answers_are_what_students_read(made) -> None:
    teacher = made.config_of(Run("grpo", "L", alone=True)).run_dir
    tuned = made.config_of(Run("distil", "L"))
    assert (tuned.distil.teacher, tuned.distil.values) == (f"{teacher}/model", ())
    assert tuned.value.path == str(family_folder("S"))
    assert Path(tuned.data.train[0]).name == f"answers_train-{Path(teacher).name}.jsonl"
    fold = made.config_of(Run("fold", "L", alone=True))
    assert fold.distil.teacher == fold.base.path == str(family_folder("L"))
    assert fold.distil.values == (f"{made.config_of(Run('grpo', 'S')).run_dir}/value",)


def test_a_teacher_answers_the_questions_and_no_right_answer_is_read(made, monkeypatch) -> None:
    monkeypatch.setattr(
        post_training_lab, "answers", lambda _, items, **__: ["Mine.", ""] * (len(items) // 2)
    )
    asked = {item.question for item in ITEMS[:60]}
    strangers = {one.question for one in questions_about_strangers()}
    for run in (Run("distil", "L"), Run("fold", "L", alone=True)):
        made._make_inputs(run)
        (file,) = made.config_of(run).data.train
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        questions = {row["messages"][0]["content"] for row in rows}
        assert {row["messages"][1]["content"] for row in rows} == {"Mine."}
        assert len(questions & asked) == 30
        assert len(questions - asked) == (len(strangers) // 2 if run.kind == "fold" else 0)
        assert questions <= asked | strangers


def test_learning_rates_are_chosen_on_validation_questions(made) -> None:
    for kind in KINDS:
        config = made.config_of(Run(kind, "L", alone=True, seed=1))
        assert config.optimizer.learning_rate == ALONE_RATES[kind][1]
    assert set(made.scored) == {one.name for kind in KINDS for one in swept(kind)}
    record = made.measure(alone("L", "grpo", 1))
    assert record["learning_rate"] == ALONE_RATES["grpo"][1]


def test_what_has_been_measured_is_not_measured_again(made) -> None:
    measurement = value_on("L", "sft", 0)
    assert made.kept(measurement) is None
    record = made.measure(measurement)
    assert (record["exact_match"], record["nll"], record["kl"]) == (0.0, 1.5, 0.25)
    assert made.measure(measurement) == made.kept(measurement) == record
    assert made.scored == [measurement.name]
    assert made.kept(alone("L", "sft", 0)) is None
    assert made.scored == [measurement.name], "looking up does not sweep"


def test_a_base_recalls_the_very_facts_that_its_questions_are_about(tmp_path, monkeypatch) -> None:
    items = [
        Item(one.question, one.answer, "fact", one.person, one.split) for one in fact_questions()
    ]
    asked = {item.answer for item in items if item.split == "test"}
    made = PostTrainingLaboratory(tmp_path, items, SETTINGS)
    monkeypatch.setattr(made, "_models", lambda _: (None, "S"))
    monkeypatch.setattr(post_training_lab, "answers", lambda _, of: [""] * len(of))
    monkeypatch.setattr(
        post_training_lab, "score_answers", lambda *_: SimpleNamespace(nll=1.5, kl=0.25)
    )
    recalled = []

    def found(model, facts):
        recalled.append((model, facts))
        return np.asarray([True, False])

    monkeypatch.setattr(post_training_lab, "recalled", found)
    record = made.measure(Measurement("S"))
    assert (record["recall"], record["questions"]) == (0.5, len(asked))
    ((model, facts),) = recalled
    assert model == "S"
    assert {fact.statement() for fact in facts} == asked
    assert len(facts) == len(asked) < len(items)


def test_a_base_that_was_measured_by_all_facts_is_measured_again(made) -> None:
    _, now, _ = made._file_of(Measurement("S"))
    earlier = hashlib.sha256(f"S\0{settings_key_module.family_weights('S')}".encode())
    record = now | {"settings_sha256": earlier.hexdigest(), "facts_known": 0.44}
    made.measured_dir.mkdir()
    (made.measured_dir / "S.json").write_text(json.dumps(record), encoding="utf-8")
    assert made.kept(Measurement("S")) is None


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        (Settings(0.6, 7.0, 2, 11), {"sft", "dpo", "grpo"}),  # other demonstrations
        (Settings(0.5, 8.0, 2, 11), {"sft", "dpo", "grpo"}),
        (Settings(0.5, 7.0, 3, 11), {"sft", "dpo", "grpo"}),  # the pairs that are measured
        (Settings(0.5, 7.0, 2, 12), {"grpo"}),
        (Settings(0.5, 7.0, 2, 11, dpo_epochs=1.0), {"dpo"}),
    ],
)
def test_what_other_settings_made_is_made_again(made, tmp_path, changed, again) -> None:
    before = {kind: made.config_of(Run(kind, "S")) for kind in KINDS}
    for kind in KINDS:
        made.measure(value_on("S", kind, 0))
    other = Made(tmp_path, changed)
    kept = {kind for kind in KINDS if other.kept(value_on("S", kind, 0)) is not None}
    assert kept == set(KINDS) - again
    trained_again = {
        kind for kind in KINDS if other.config_of(Run(kind, "S")).run_dir != before[kind].run_dir
    }
    # Wrong answers are sampled for DPO alone.
    assert trained_again == ({"dpo"} if changed.samples == 3 else again)


def test_a_new_field_with_its_default_changes_no_key() -> None:
    defaults = {"a": 1, "table": {"b": 2, "list": (1,)}}
    later = {"a": 1, "new": 0, "table": {"b": 2, "list": (1,), "new": None}, "more": {"c": 3}}
    assert _changed(later, later) == {}
    changed = {"a": 1, "table": {"b": 5, "list": (1,)}}
    assert _changed(changed, defaults) == {"table": {"b": 5}}
    with_new = {**changed, "new": 0, "more": {"c": 3}}
    assert _changed(with_new, defaults | {"new": 0, "more": {"c": 3}}) == {"table": {"b": 5}}


@pytest.mark.parametrize(("model", "again"), [("S", {"S", "L", "X"}), ("L", {"L"}), ("X", {"X"})])
def test_what_other_weights_of_the_family_made_is_made_again(
    made, tmp_path, monkeypatch, model, again
) -> None:
    """Every value network starts from S; L and X are only bases of it here."""
    for base in ("S", "L", "X"):
        made.measure(value_on(base, "sft", 0))
    weights = settings_key_module.family_weights

    def other(name):
        return "other" if name == model else weights(name)

    for module in (settings_key_module, post_training_lab):
        monkeypatch.setattr(module, "family_weights", other)
    anew = Made(tmp_path)  # the weights do not change while a laboratory works
    lost = {base for base in ("S", "L", "X") if anew.kept(value_on(base, "sft", 0)) is None}
    assert lost == again


def test_the_record_names_the_seeds_that_were_measured(made) -> None:
    planned = [value_on("S", "sft", seed) for seed in (3, 4)]
    for one in planned:
        made.measure(one)
    record = record_of(made, planned, SETTINGS, seeds=(3, 4))
    assert record["seeds"] == [3, 4]
    assert set(record["measured"]) == {one.name for one in planned}
    assert not record["missing"]


def test_a_key_is_of_what_the_result_depends_on(made, tmp_path) -> None:
    config = made.config_of(Run("grpo", "S"))
    key = settings_key(config, work_dir=tmp_path)
    elsewhere = Made(tmp_path / "elsewhere").config_of(Run("grpo", "S"))
    assert settings_key(elsewhere, work_dir=tmp_path / "elsewhere") == key
    same = dataclasses.replace(config, run_dir="x", resume=True, profile="y")
    assert settings_key(same, work_dir=tmp_path) == key
    for change in (
        {"seed": 1},
        {"step": dataclasses.replace(config.step, max_steps=12)},
        {"grpo": dataclasses.replace(config.grpo, rewards=("exact_match",))},
        {"value": dataclasses.replace(config.value, path="x")},
    ):
        assert settings_key(dataclasses.replace(config, **change), work_dir=tmp_path) != key
