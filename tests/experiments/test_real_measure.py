"""Measurements of the study of a real model: each once, of what it was made with."""

from pathlib import Path
from typing import Any

import pytest

from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.real import measure as real_measure
from ivl_jax.experiments.real.lab import RealLaboratory
from ivl_jax.experiments.real.measure import Measurements
from ivl_jax.experiments.real.settings import Budget, Stage
from ivl_jax.experiments.real.subjects import SUBJECTS

ITEMS = [
    *(Item(f"{i}?", f"It is {i}. #### {i}", "gsm8k", "", "test") for i in range(4)),
    *(Item(f"What does `f{i}` do?", "It does.", "docstring", "", "test") for i in range(3)),
    Item("Learnt?", "Yes.", "gsm8k", "", "train"),
]


class Made(RealLaboratory):
    """A laboratory whose stages are made at once."""

    def __init__(
        self,
        *finished: Stage,
        folder: Path = Path("none"),
        keys: str = "",
        exports: Path | None = None,
    ) -> None:
        self.items, self.target, self.target_key = ITEMS, Path("target"), "t"
        self.budget, self.exports = Budget(answered=3, answer_tokens=9), exports
        self._finished, self._folders, self._stage_keys = finished, folder, keys

    def finished(self, stage: Stage) -> bool:
        return stage in self._finished

    def output(self, stage: Stage) -> Path:
        return self._folders / stage

    def key(self, stage: Stage) -> str:
        return f"{stage} {self._stage_keys}"


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each model was composed of; NLL is the number of questions, two answers are right."""
    found: list[Any] = []

    def compose(*parts: str, strengths: Any = (), maps: Any = ()) -> ComposedModel:
        found.append((*parts, *strengths, *(Path(one).name for one in maps)))
        return object.__new__(ComposedModel)

    def answers(_: Any, items: list[Item], *, max_new_tokens: int, **__: Any) -> list[str]:
        assert max_new_tokens == 9
        return [item.answer if i else "I think 77." for i, item in enumerate(items)]

    for name, stand_in in {
        "compose": compose,
        "answers": answers,
        "load_language_model": lambda folder: f"model {folder.name}",
        "load_value": lambda folder: f"value {folder.name}",
        "family_map": lambda *_, path: path.touch(),
        "response_nll": lambda _, items, rows: float(len(items)),
    }.items():
        monkeypatch.setattr(real_measure, name, stand_in)
    return found


def test_what_is_composed_follows_the_table(composed: list[Any], tmp_path: Path) -> None:
    for stage in ("value", "family_value"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "ivl.json").touch()
    measured = Measurements(Made(folder=tmp_path), tmp_path)
    for subject in SUBJECTS:
        measured.measure(subject)
    assert composed == [
        ("model sibling",),
        ("model healing",),
        ("model healing", "value value"),
        ("model donor_tuned",),
        ("model target",),
        ("model target", "value value"),
        ("model target", "value family_value", "map-family_value .safetensors"),
        ("model target", "model donor_tuned", "model healing", 1.0, -1.0),
        ("model target_lora",),
        ("model target_full",),
    ]


def test_a_record_is_of_test_questions_and_of_those_that_are_answered(
    composed: list[Any], tmp_path: Path
) -> None:
    measured = Measurements(Made(), tmp_path)
    record = measured.measure("target_value")
    assert record["nll"] == {"gsm8k": 4.0, "docstring": 3.0}
    assert record["questions"] == {"gsm8k": 4, "docstring": 3}
    assert (record["right"], record["answered"]) == (2, 3)
    low, high = record["interval"]
    assert low < 2 / 3 < high
    through_a_map = measured.measure("target_family_value")
    assert through_a_map["nll"] == {"docstring": 3.0}
    assert "right" not in through_a_map


def test_a_measurement_is_made_again_only_of_another_model(
    composed: list[Any], tmp_path: Path
) -> None:
    measured = Measurements(Made(), tmp_path)
    assert measured.kept("target_value") is None
    record = measured.measure("target_value")
    assert measured.measure("target_value") == measured.kept("target_value") == record
    assert len(composed) == 1
    other = Measurements(Made(keys="other"), tmp_path)
    assert other.kept("target_value") is None
    restored = Made(exports=tmp_path)
    assert Measurements(restored, tmp_path).kept("target_value") is None


def test_a_subject_can_be_measured_once_all_its_parts_are_made(tmp_path: Path) -> None:
    none = Measurements(Made(), tmp_path)
    assert [subject for subject in SUBJECTS if none.possible(subject)] == ["target"]
    some = Measurements(Made("healing", "value"), tmp_path)
    assert {subject for subject in SUBJECTS if some.possible(subject)} == {
        *("target", "donor", "donor_value", "target_value"),
    }
