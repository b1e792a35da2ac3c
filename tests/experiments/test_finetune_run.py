"""One fine-tuning of a reference: its demonstrations, its key, its config, its added rows."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import TrainConfig, load_config
from ivl_jax.data.batching import lay_out_rows
from ivl_jax.experiments.demonstrations import Item, build_items
from ivl_jax.experiments.finetune import run as finetune_run
from ivl_jax.experiments.finetune.run import (
    fine_tune,
    items_of,
    run_config,
    run_key,
    with_statements,
)
from ivl_jax.experiments.finetune.settings import Point, Setting
from ivl_jax.weights.language_model import load_language_model

_ITEMS = [
    Item("Who?", "A.", "fact", "a", "train"),
    Item("Where?", "B.", "fact", "b", "validation"),
    Item("What does `f` do?", "C.", "docstring", "c", "train"),
]
_SETTING = Setting("S", "both", learning_rate=1e-3, epochs=3.0)


@pytest.fixture
def config(project_root: Path) -> TrainConfig:
    return load_config(project_root / "configs" / "demo.toml", TrainConfig)


def test_a_setting_chooses_its_kinds_and_repeats_only_training_facts() -> None:
    assert items_of(_ITEMS, _SETTING) == _ITEMS
    assert items_of(_ITEMS, dataclasses.replace(_SETTING, kinds="docstrings")) == _ITEMS[2:]
    others = [*_ITEMS, Item("1 + 1?", "2", "gsm8k", "1", "train")]
    assert items_of(others, _SETTING) == _ITEMS
    assert items_of(others, dataclasses.replace(_SETTING, kinds="all")) == others
    repeated = dataclasses.replace(_SETTING, kinds="facts", fact_repeats=3)
    assert items_of(_ITEMS, repeated) == [*_ITEMS[:2], _ITEMS[0], _ITEMS[0]]


def test_the_config_differs_from_the_demo_in_the_setting_only(config: TrainConfig) -> None:
    setting = dataclasses.replace(_SETTING, weight_decay=0.1, batch_size=8, seed=2)
    tuned = run_config(config, setting, model=family_folder("L"))
    assert (tuned.method, tuned.penalty.kind, tuned.seed) == ("sft", "none", 2)
    assert tuned.base.path == str(family_folder("L"))
    assert (tuned.optimizer.learning_rate, tuned.optimizer.weight_decay) == (1e-3, 0.1)
    assert (tuned.step.epochs, tuned.step.batch_size) == (3.0, 8)
    assert tuned.data == config.data
    back = {"learning_rate": config.optimizer.learning_rate, "weight_decay": 0.01}
    assert dataclasses.replace(tuned.optimizer, **back) == config.optimizer


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 3e-3},
        {"rank": 16},
        {"frozen_embeddings": True},
        {"statement_rows": 4},
        {"seed": 1},
        {"kinds": "facts"},
    ],
)
def test_whatever_changes_a_run_changes_its_key(config: TrainConfig, changed: dict) -> None:
    def key(setting: Setting, model: Path, config: TrainConfig = config) -> str:
        return run_key(
            run_config(config, setting, model=model), setting, _ITEMS, model=family_folder("S")
        )

    here = key(_SETTING, family_folder("S"))
    assert key(_SETTING, Path("/elsewhere/S")) == here  # where the files are does not count
    assert key(dataclasses.replace(_SETTING, **changed), family_folder("S")) != here
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=128))
    assert key(_SETTING, family_folder("S"), longer) != here


def test_statements_are_rows_of_their_own_whose_targets_all_count() -> None:
    dialogue = np.array([1, 7, 8], np.int32), np.array([False, False, True])
    batch = lay_out_rows([[dialogue]], sequence_length=4, pad_id=0)
    both = with_statements(batch, np.arange(10, dtype=np.int32).reshape(2, 5))
    assert both.tokens.tolist() == [[1, 7, 0, 0], [0, 1, 2, 3], [5, 6, 7, 8]]
    assert both.targets.tolist()[1:] == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert both.loss_mask.tolist() == [[False, True, False, False], [True] * 4, [True] * 4]
    assert both.positions.tolist()[1:] == [[0, 1, 2, 3]] * 2
    assert both.segment_ids.tolist() == [[1, 1, 0, 0], [1] * 4, [1] * 4]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_resumes_and_ends_as_if_it_had_not_been_killed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(finetune_run, "EVALUATIONS", 3)
    monkeypatch.setattr(finetune_run, "_ROWS", 8)
    facts = [item for item in build_items() if item.kind == "fact"]
    items = [
        item
        for split, count in (("train", 60), ("validation", 8))
        for item in [one for one in facts if one.split == split][:count]
    ]
    setting = Setting("S", "facts", learning_rate=1e-3, epochs=3.0, rank=rank, batch_size=2)
    if not rank:
        setting = dataclasses.replace(setting, statement_rows=1, frozen_embeddings=True)
    base = family_folder("S")
    wanted = run_config(config, setting, model=base)

    class Killed(Exception):
        pass

    def run(name: str, *, kill_at: int = 0) -> tuple[list[Point], list[int]]:
        seen: list[int] = []

        def on_point(point: Point) -> None:
            seen.append(point.step)
            if len(seen) == kill_at:
                raise Killed

        fit = fine_tune(
            wanted,
            setting,
            items,
            run_dir=tmp_path / name,
            data_dir=tmp_path / "data",
            on_point=on_point,
        )
        return fit.curve, seen

    whole, steps = run("whole")
    assert len(steps) == 3
    with pytest.raises(Killed):
        run("killed", kill_at=2)
    resumed, later = run("killed")
    assert later == steps[2:]
    assert resumed == whole
    models = [load_language_model(str(tmp_path / n / "best_nll")) for n in ("whole", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *(model.params for model in models))
    before = load_language_model(str(base)).params
    same = jax.tree.map(np.array_equal, before, models[0].params)
    assert same["embed_tokens"]["embedding"]  # frozen, or beside an adapter
    assert not all(jax.tree.leaves(same))
    assert not (tmp_path / "killed" / "checkpoints").exists()
