"""The matrix's laboratory: what a kept training and a kept measurement have to be about."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments.demonstrations import Item, items_hash
from ivl_jax.experiments.finetune import references
from ivl_jax.experiments.finetune.settings import Setting
from ivl_jax.experiments.transfer import lab as lab_module
from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.lab import Laboratory
from ivl_jax.experiments.transfer.matrix import Measurement, on, proxy, reference, value_on

_ITEMS = [
    Item("Who?", "A.", "fact", "a", "train"),
    Item("Where?", "B.", "fact", "b", "validation"),
    Item("When?", "C.", "fact", "c", "test"),
]


@pytest.fixture
def config(project_root: Path) -> TrainConfig:
    return load_config(project_root / "configs" / "demo.toml", TrainConfig)


@pytest.fixture(autouse=True)
def nothing_is_pre_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        pytest.fail("pre-trains for minutes")

    monkeypatch.setattr(lab_module, "continue_pretraining", refuse)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the one record of fine-tunings, which stands in for that of every model."""
    file = tmp_path / "finetuned.json"
    monkeypatch.setattr(references, "record_file", lambda model: file)

    def write(*, step: int = 10, nll: float = 2.0) -> None:
        setting = Setting("S", "both", learning_rate=1e-3, epochs=3.0)
        tests = [{"seed": 0, "step": step, "nll": nll, "validation_nll": 2.5, "exact_match": 0.5}]
        chosen = {"setting": dataclasses.asdict(setting), "test": tests}
        record = {
            "test_items_sha256": items_hash([_ITEMS[2]]),
            "chosen": {"nll": chosen, "exact_match": chosen},
            "tried": 5,
        }
        file.write_text(json.dumps(record), "utf-8")

    write()
    return write


def _keys(laboratory: Laboratory, *measurements: Measurement) -> list[dict[str, str]]:
    return [laboratory._key(measurement) for measurement in measurements]


def test_a_key_is_of_what_a_measurement_depends_on_and_of_no_folder(
    config: TrainConfig, recorded: Any, tmp_path: Path
) -> None:
    shown = [
        *(Measurement(base) for base in ("S", "L", "L-continued", "X", "XL")),
        *(value_on(base)(0) for base in ("S", "L", "L-continued", "X", "XL")),
        on("L", matrix.Term(matrix.base_choices(0)[1])),
        proxy("L", 0),
        reference("S")(0),
    ]
    first = _keys(Laboratory(tmp_path / "a", config, _ITEMS), *shown)
    assert len({key["settings_sha256"] for key in first}) == len(shown)
    elsewhere = Laboratory(tmp_path / "b", config, _ITEMS, references=tmp_path / "c")
    assert _keys(elsewhere, *shown) == first

    def changed(config: TrainConfig = config, items: list[Item] = _ITEMS) -> set[int]:
        now = _keys(Laboratory(tmp_path / "d", config, items), *shown)
        return {at for at, (one, other) in enumerate(zip(first, now, strict=True)) if one != other}

    trained = set(range(5, 11))
    penalty = dataclasses.replace(config.penalty, positions="all")
    assert changed(dataclasses.replace(config, penalty=penalty)) == trained
    assert changed(items=[_ITEMS[0]._replace(answer="D."), *_ITEMS[1:]]) == trained
    assert changed(items=[*_ITEMS[:2], _ITEMS[2]._replace(answer="D.")]) == set(range(len(shown)))
    recorded(step=20)
    assert changed() == {11, 12}


def test_a_network_of_another_config_is_trained_anew(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def run(config: TrainConfig) -> SimpleNamespace:
        made.append(config.optimizer.learning_rate)
        folder = Path(config.run_dir)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "value").mkdir()
        return SimpleNamespace(output=folder / "value")

    monkeypatch.setattr(lab_module, "run", run)
    faster = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0)
    )
    one, again, other = (
        Laboratory(tmp_path, each, _ITEMS).train(matrix.recipe(0))
        for each in (config, config, faster)
    )
    assert one == again != other
    assert made == [config.optimizer.learning_rate, 1.0]


def test_a_reference_alone_has_its_recorded_figures(
    config: TrainConfig, recorded: Any, tmp_path: Path
) -> None:
    recorded(nll=1.25)
    laboratory = Laboratory(tmp_path, config, _ITEMS)
    figures = laboratory.measure(reference("S")(0))
    assert {name: figures[name] for name in ("nll", "validation_nll", "exact_match")} == {
        "nll": 1.25,
        "validation_nll": 2.5,
        "exact_match": 0.5,
    }
    assert laboratory.kept(reference("S")(0)) == figures
    recorded(nll=1.5)
    assert Laboratory(tmp_path, config, _ITEMS).kept(reference("S")(0)) is None


def test_what_another_command_has_to_make_is_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "record_file", lambda model: tmp_path / "none.json")
    laboratory = Laboratory(tmp_path, config, _ITEMS, xl=tmp_path / "XL")
    assert laboratory.lacks(value_on("L")(0)) == ""
    assert "pretrain_family --model XL" in laboratory.lacks(value_on("XL")(0))
    assert "finetune_sweep --models S" in laboratory.lacks(proxy("L", 0))
    assert laboratory.kept(proxy("L", 0)) is None
