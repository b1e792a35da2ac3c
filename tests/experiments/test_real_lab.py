"""The stages of the study of a real model: what they need, and when they are made again."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ivl_jax.config.train import check_train_config
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.family.facts import Split
from ivl_jax.experiments.finetune.run import Fit
from ivl_jax.experiments.finetune.settings import Point
from ivl_jax.experiments.real import lab as real_lab
from ivl_jax.experiments.real.lab import RealLaboratory
from ivl_jax.experiments.real.settings import STAGES, Budget, Stage

MADE: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage != "measure")
_TRAIN: tuple[Split, ...] = ("train",) * 8
SPLITS: tuple[Split, ...] = (*_TRAIN, "validation", "test")
ITEMS = [
    Item(f"{kind} {i}?", f"{i}", kind, f"{kind} {i}", split)
    for kind in ("gsm8k", "docstring")
    for i, split in enumerate(SPLITS)
]
BUDGET = Budget(dialogues=6, rank=3, held_out=1, answered=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder that stands for the target's."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    return folder


def laboratory(
    target: Path, work: Path, budget: Budget = BUDGET, items: Sequence[Item] = ITEMS
) -> RealLaboratory:
    return RealLaboratory(work, target, list(items), budget)


def keys(made: RealLaboratory) -> dict[Stage, str]:
    return {stage: made.key(stage) for stage in MADE}


def changed(one: dict[Stage, str], two: dict[Stage, str]) -> set[Stage]:
    return {stage for stage in MADE if one[stage] != two[stage]}


DONORS: set[Stage] = {"healing", "value", "donor_tuned"}
TUNED: set[Stage] = {"donor_tuned", "target_lora", "target_full"}


@pytest.mark.parametrize(
    ("fields", "again"),
    [
        ({"first_layers": 6}, {"sibling", *DONORS}),
        ({"temperature": 0.5}, {"text", *DONORS}),
        ({"healing_rate": 1e-3}, DONORS),
        ({"value_tokens": 500_000}, {"value", "family_value"}),
        ({"value_rate": 1e-3}, {"value"}),
        ({"tuning_tokens": 500_000}, TUNED),
        ({"lora_rate": 1e-3}, {"target_lora"}),
        ({"rank": 4}, {"target_lora"}),
        ({"held_out": 2, "answer_tokens": 7}, set()),
    ],
)
def test_a_stage_is_made_again_only_where_it_depends_on_what_changed(
    target: Path, tmp_path: Path, fields: dict[str, Any], again: set[Stage]
) -> None:
    before = keys(laboratory(target, tmp_path / "work"))
    after = keys(laboratory(target, tmp_path / "work", dataclasses.replace(BUDGET, **fields)))
    assert changed(before, after) == again


def test_where_folders_are_does_not_count_but_the_target_and_the_demonstrations_do(
    target: Path, tmp_path: Path
) -> None:
    before = keys(laboratory(target, tmp_path / "work"))
    elsewhere = shutil.copytree(target, tmp_path / "elsewhere")
    assert keys(laboratory(elsewhere, tmp_path / "other")) == before
    items = [item._replace(answer=item.answer + "!") for item in ITEMS]
    assert changed(keys(laboratory(target, tmp_path / "work", items=items)), before) == {
        *("value", "family_value"),
        *TUNED,
    }
    asked = [item._replace(question=item.question + "?") for item in ITEMS]
    assert changed(keys(laboratory(target, tmp_path / "work", items=asked)), before) == {
        *("text", "family_value"),
        *(DONORS | TUNED),
    }
    (elsewhere / "model.safetensors").write_text("other weights")
    other = keys(laboratory(elsewhere, tmp_path / "work"))
    assert changed(other, before) == set(MADE)


def test_every_training_has_a_complete_config(target: Path, tmp_path: Path) -> None:
    made = laboratory(target, tmp_path / "work")
    for stage in MADE[2:]:
        config = made._placed(made._config(stage), tmp_path / "run")
        check_train_config(config)
        beside = stage in ("value", "family_value")
        assert config.method == ("value" if beside else "sft")
        assert (config.penalty.weight > 0) == beside
        assert config.objective == ("distil" if stage == "healing" else "sft")
    assert made._config("healing").distil.teacher == str(target)
    assert made._config("value").base.path == str(made.output("healing"))
    assert made._config("donor_tuned").base.path == str(made.output("healing"))


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every maker notes its stage and leaves its output."""
    order: list[str] = []

    def sibling(model: Path, folder: Path, *, first: int, last: int) -> None:
        order.append(f"sibling {first}+{last}")
        folder.mkdir()

    def text(model: Any, questions: list[str], folder: Path, writing: Any) -> None:
        order.append(f"text of {writing.invented}+{len(questions)}")
        folder.mkdir()
        (folder / "dialogues.jsonl").touch()

    def train(name: str, run_dir: Path, output: Path, **_: Any) -> Path:
        order.append(name)
        output.mkdir(parents=True)
        return output

    def tune(config: Any, setting: Any, items: Any, *, run_dir: Path, **_: Any) -> Any:
        order.append(f"{run_dir.name.rpartition('-')[0]} {setting.rank}")
        (run_dir / "best_nll").mkdir(parents=True, exist_ok=True)
        return Fit([Point(3, 1.5, None, None, 1.5)], [1.0], 2.0)

    monkeypatch.setattr(real_lab, "make_sibling", sibling)
    monkeypatch.setattr(real_lab, "write_dialogues", text)
    monkeypatch.setattr(real_lab, "train_once", train)
    monkeypatch.setattr(real_lab, "fine_tune", tune)
    monkeypatch.setattr(real_lab, "load_language_model", lambda _: None)
    monkeypatch.setattr(real_lab, "compose", lambda _: None)
    return order


def test_what_a_stage_needs_is_made_first_and_nothing_twice(
    target: Path, tmp_path: Path, makers: list[str]
) -> None:
    made = laboratory(target, tmp_path / "work")
    assert not made.finished("value")
    made.make("value")
    assert makers == ["sibling 5+5", "text of 3+3", "healing", "value"]
    for stage in MADE:
        assert made.make(stage) == made.output(stage)
        assert made.finished(stage)
        assert made.output(stage).exists()
    assert makers[4:] == ["family_value", "donor_tuned 0", "target_lora 3", "target_full 0"]
    fit = made.output("target_lora").with_name("fit.json")
    assert json.loads(fit.read_text(encoding="utf-8"))["curve"][0]["nll"] == 1.5


def test_a_fine_tuning_that_was_killed_is_not_finished(
    target: Path, tmp_path: Path, makers: list[str]
) -> None:
    made = laboratory(target, tmp_path / "work")
    made.output("target_lora").mkdir(parents=True)  # the best step so far
    assert not made.finished("target_lora")
    made.make("target_lora")
    assert makers == ["target_lora 3"]


def test_the_target_answers_training_questions_of_all_kinds_and_reads_no_answer(
    target: Path, tmp_path: Path
) -> None:
    asked = laboratory(target, tmp_path, dataclasses.replace(BUDGET, dialogues=24))._questions()
    assert len(asked) == 12
    train = {item.question for item in ITEMS if item.split == "train"}
    assert set(asked) <= train
    assert {question.split()[0] for question in asked} == {"gsm8k", "docstring"}


def test_what_was_exported_is_restored_apart_and_only_where_it_belongs(
    target: Path, tmp_path: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(file: Path, *given: Any, start: Path, identity: str, **_: Any) -> None:
        makers.append(f"{file.stem.partition('-')[0]} from {start.name} {identity[:4]}")
        if given and isinstance(given[0], Path):
            given[0].mkdir(parents=True)  # restored
        else:
            file.touch()

    monkeypatch.setattr(real_lab, "export_change", note)
    monkeypatch.setattr(real_lab, "restore_change", note)
    made, exports = laboratory(target, tmp_path / "work"), tmp_path / "exports"
    exports.mkdir()
    for stage in ("value", "target_lora"):
        made.make(stage)
    makers.clear()
    made.export(exports, megabytes=20.0)
    sibling, donor = made.key("sibling"), made.key("healing")
    exported = [
        f"healing from {made.output('sibling').name} {sibling[:4]}",
        f"value from model {donor[:4]}",
        f"target_lora from target {made.target_key[:4]}",
    ]
    assert makers == exported
    assert {file.name for file in exports.iterdir()} == {
        f"{stage}-{made.key(stage)[:10]}.safetensors"
        for stage in ("healing", "value", "target_lora")
    }

    makers.clear()
    elsewhere = RealLaboratory(tmp_path / "work", target, ITEMS, BUDGET, exports=exports)
    assert keys(elsewhere) == keys(made)
    for stage in ("value", "target_lora", "donor_tuned"):
        assert elsewhere.make(stage) == elsewhere.output(stage) != made.output(stage)
        assert elsewhere.finished(stage)
    assert makers == ["sibling 5+5", *exported, "donor_tuned 0"]
    other = dataclasses.replace(BUDGET, healing_rate=1e-3)
    changed_budget = RealLaboratory(tmp_path / "work", target, ITEMS, other, exports=exports)
    assert not changed_budget.finished("value")
