"""The study of lifts: what differs from the recipe, how one is chosen, and all of it, tiny."""

import dataclasses
import json
from pathlib import Path

import pytest

from ivl_jax.assets import config_file, family_folder
from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments import pretrain_family
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.family.corpus import Corpus, SourceFile
from ivl_jax.experiments.family.facts import build_facts
from ivl_jax.experiments.lifts import lab as lifts_lab
from ivl_jax.experiments.lifts import study
from ivl_jax.experiments.lifts.lab import LiftsLaboratory
from ivl_jax.experiments.lifts.plan import (
    CHANGES,
    LABELS,
    LIFTS,
    Budget,
    Row,
    best_lift,
    final_rows,
    validation_rows,
)
from ivl_jax.experiments.lifts.report import BEGIN, END, section
from ivl_jax.experiments.transfer import lab as transfer_lab
from ivl_jax.experiments.transfer.matrix import recipe
from ivl_jax.weights.language_model import load_language_model

ITEMS = [
    Item(f"What is the {kind} {split} {i}?", f"It is {i}.", kind, f"group {i}", split)
    for kind in ("fact", "docstring")
    for split in ("train", "validation", "test")
    for i in range(8)
]


def figures(nll, **more):
    return {"nll": nll, **more}


def all_but(nlls):
    """Validation figures: 3 nats, but for those given."""
    return {row.name: figures(nlls.get(row[:2], 3.0)) for row in validation_rows(0)}


def test_rows_are_named_once_and_every_lift_has_a_label():
    planned = [*validation_rows(0), *final_rows("dropout", (0, 1, 2))]
    assert len({row.name for row in planned}) == len(planned)
    assert set(LABELS) == set(LIFTS) > set(CHANGES)
    assert [row.lift for row in final_rows("plain", (0,))] == ["plain", "plain"]


def test_the_lift_with_the_lowest_mean_of_both_targets_is_chosen():
    found = all_but({("dropout", "L"): 2.0, ("temperature", "L"): 2.4, ("temperature", "X"): 2.4})
    assert best_lift(found, 0) == "temperature"
    assert best_lift(all_but({}), 0) == "plain"  # the first of equals
    found.pop(Row("warmup", "X").name)
    assert best_lift(found, 0) is None


@pytest.fixture
def laboratory(tmp_path, monkeypatch):
    config = load_config(config_file("demo.toml"), TrainConfig)
    monkeypatch.setattr(transfer_lab, "write_value_as_model", lambda value, folder: None)
    made = LiftsLaboratory(tmp_path, config, ITEMS, Budget(target_rows=4))
    monkeypatch.setattr(made._matrix, "train", lambda training: tmp_path / training.name)
    monkeypatch.setattr(made, "_early", lambda: tmp_path / "early")
    return made


def test_each_lift_is_the_recipe_but_for_its_options(laboratory, tmp_path):
    plain = laboratory._matrix.config_of(recipe(5), tmp_path / "run")
    trained = {lift for lift in LIFTS if lift not in ("plain", "calibrated")}
    for lift in trained:
        made = laboratory._config(lift, 5, tmp_path / "run")
        different = {
            field.name
            for field in dataclasses.fields(made)
            if getattr(made, field.name) != getattr(plain, field.name)
        }
        if lift == "bases":
            assert different == {"base", "bases"}
            assert [base.path for base in made.bases] == [plain.base.path, str(tmp_path / "early")]
        elif lift == "adapted":
            assert different == {"base", "value", "optimizer", "step"}
            assert made.base.path == str(family_folder("L"))
            assert made.value.path.endswith("-exported")
            assert made.step.max_steps == Budget().adapted_steps
        else:
            assert different == set(CHANGES[lift])


def test_the_early_s_is_pre_trained_for_less_with_the_tokenizer_of_s_and_once(
    laboratory, monkeypatch
):
    tiny = pretrain_family.RECIPES["S"]._replace(width=16, mlp_width=16, head_dim=4, rows=4)
    monkeypatch.setitem(pretrain_family.RECIPES, "S", tiny)
    sources = tuple(SourceFile(f"{i}.py", "def count():\n    return 1\n" * 200) for i in range(4))
    corpus = Corpus(sources, sources[:1], tuple(build_facts(count=4)))
    monkeypatch.setattr(lifts_lab, "load_corpus", lambda: corpus)
    early = LiftsLaboratory._early(laboratory)
    manifest = json.loads((early / "manifest.json").read_text())
    assert manifest["recipe"]["epochs"] == Budget().early_epochs < tiny.epochs
    assert manifest["steps"] > 0
    model, shipped = load_language_model(early), load_language_model(family_folder("S"))
    assert model.arch.hidden_size == 16
    assert model.tokenizer_info == shipped.tokenizer_info
    monkeypatch.setattr(lifts_lab, "make_model", None)
    assert LiftsLaboratory._early(laboratory) == early


def test_no_lift_is_judged_by_the_rows_that_it_is_calibrated_on(laboratory):
    judged = set(laboratory._splits["validation"])
    assert len(laboratory._rows) == 4
    assert not judged & set(laboratory._rows)
    assert len(judged) == 12


def test_the_section_shows_the_choice_and_what_is_missing():
    measured = all_but({("dropout", "L"): 2.5, ("dropout", "X"): 2.75})
    measured[Row("calibrated", "X").name] |= {"strength": 1.25, "temperature": 1.1}
    for seed, nll in enumerate((2.0, 2.1, 2.2)):
        for target in ("L", "X"):
            row = Row("dropout", target, seed, "test")
            measured[row.name] = figures(nll, exact_match=0.5)
    record = {"seeds": [0, 1, 2], "best": "dropout", "measured": measured, "missing": ["this"]}
    text = section(record)
    assert "| base dropout, 0.1 | 2.500 | 2.750 | 2.625 |  |" in text
    assert "| α and T calibrated | 3.000 | 3.000 | 3.000 | 1.25, 1.10 |" in text
    assert "Chosen: base dropout, 0.1, 0.375 nats below the demo's recipe." in text
    assert "| base dropout, 0.1 | 2.100 ± 0.248 | 50.0% ± 0.0% | 2.100 ± 0.248 |" in text
    assert "Not measured yet (1): `this`." in text
    assert "No lift is better" in section(record | {"best": "plain"})
    assert "Chosen" not in section(record | {"best": None, "missing": []})


@pytest.mark.slow
@pytest.mark.usefixtures("caplog")  # make_mesh says that one of eight virtual devices is used
def test_the_quick_study_makes_everything_and_a_second_run_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "build_items", lambda: ITEMS)
    monkeypatch.setattr(LiftsLaboratory, "_early", lambda self: family_folder("L"))
    arguments = ["--quick", "--seeds", "0", "--work-dir", str(tmp_path), "--docs", "nowhere"]
    assert study.main(arguments) == 0
    docs = tmp_path / "quick" / "docs"
    record = json.loads((docs / "lifts.json").read_text())
    assert record["missing"] == []
    assert record["best"] in LIFTS
    nlls = {name: one["nll"] for name, one in record["measured"].items() if "L__" in name}
    validation = [nll for name, nll in nlls.items() if "validation" in name]
    # A tenth of a few dialogues may be none.
    assert len(set(validation)) >= len(LIFTS) - 1, "no two lifts are the same model"
    assert record["measured"][Row("calibrated", "X").name]["temperature"] > 0
    page = (docs / "experiments.md").read_text()
    assert BEGIN in page
    assert page.endswith(f"{END}\n")

    def refuse(*_, **__):
        raise AssertionError("nothing is made or measured again")

    monkeypatch.setattr(lifts_lab, "run", refuse)
    monkeypatch.setattr(lifts_lab, "compose", refuse)
    assert study.main(arguments) == 0
    assert (docs / "experiments.md").read_text() == page
    assert not Path("nowhere").exists()
