"""The study of baselines: what it compares, each method's composition, and its section."""

import dataclasses
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.composition import compose_logits
from ivl_jax.experiments.baselines import lab as baselines_lab
from ivl_jax.experiments.baselines.lab import BaselinesLaboratory, to_forget
from ivl_jax.experiments.baselines.plan import (
    LABELS,
    SEEDS,
    TARGET_ROWS,
    UNLEARNING,
    Row,
    Setting,
    rows,
    settings_of,
)
from ivl_jax.experiments.baselines.report import BEGIN, END, RECORD, section, update_page
from ivl_jax.experiments.demonstrations import Item, target_rows
from ivl_jax.experiments.transfer.matrix import fine_tuned
from ivl_jax.vocabulary.value_term import ValueTerm
from ivl_jax.weights.language_model import load_language_model


def items():
    return [
        Item(f"{kind} {split} {i}?", f"{i}.", kind, f"group {i // 3}", split)
        for kind in ("fact", "docstring")
        for split in ("train", "validation", "test")
        for i in range(60)
    ]


def test_rows_are_named_once_and_every_method_is_measured_and_has_a_label():
    planned = list(rows())
    assert len({row.name for row in planned}) == len(planned)
    assert {row.method for row in planned} == set(LABELS)
    assert len(list(rows((5,)))) < len(planned)
    assert settings_of("value") == [Setting(1.0)]
    for method in ("calibrated", "entropy", "kl"):
        found = settings_of(method)
        assert len(set(found)) == len({one.sentence for one in found}) == len(found) > 4


def test_a_temperature_is_the_base_as_a_second_summand():
    rng = np.random.default_rng(0)
    base, value = (jnp.asarray(rng.standard_normal((1, 2, 5)), jnp.float32) for _ in range(2))
    strengths = Setting(0.75, 1.25).strengths
    terms = [
        ValueTerm(logits, jnp.asarray([alpha]), 5)
        for logits, alpha in zip((value, base), strengths, strict=True)
    ]
    found = compose_logits(base, terms, vocab_size=5)
    np.testing.assert_allclose(found, (base + 0.75 * value) / 1.25, atol=1e-6)
    assert Setting(0.75).strengths == (0.75, 0.0)


def test_settings_are_chosen_on_validation_rows_and_every_other_person_is_forgotten():
    chosen = target_rows(items(), TARGET_ROWS)
    assert len(set(chosen)) == TARGET_ROWS
    assert {item.split for item in chosen} == {"validation"}
    assert sum(item.kind == "fact" for item in chosen) == TARGET_ROWS // 2
    facts = [item for item in items() if item.kind == "fact" and item.split == "test"]
    gone = to_forget(facts)
    assert len({item.group for item in gone}) == 10 == len({item.group for item in facts}) // 2
    assert not {item.group for item in gone} & {i.group for i in facts if i not in gone}


@pytest.fixture(scope="module")
def network():
    """Makes models whose parameters are one number."""
    small = load_language_model(str(family_folder("S")))

    def make(name, number):
        layers = {layer: {"kernel": np.asarray([number])} for layer in range(2)}
        params = {"layers": layers, "norm": np.asarray([number])}
        return dataclasses.replace(small, path=name, params=params)

    return make


@pytest.mark.parametrize(
    ("row", "base", "values", "strengths"),
    [
        (Row("L", "soup"), "L 10", ["value 2"], 1),
        (Row("L", "ensemble"), "L 10", ["value 1", "value 2", "value 3"], 1 / 3),
        (Row("L", "unlearned", strength=0.5), "L 10", ["value 1", "forgetting 7"], (1.5, -0.5)),
        (Row("L-continued", "diff"), "L-continued 30", [], 1),
    ],
    ids=lambda row: row.name if isinstance(row, Row) else "",
)
def test_each_method_is_its_composition(
    monkeypatch, tmp_path, network, row, base, values, strengths
):
    made = []

    def compose(base, *values, strengths=1, maps=()):
        def named(model):
            return f"{model.path} {float(model.params['norm'][0]):g}"

        made.append((named(base), [named(value) for value in values], strengths))
        return types.SimpleNamespace()

    laboratory = object.__new__(BaselinesLaboratory)
    numbers = {"L": 10.0, "L-continued": 25.0, "S": 1.0}
    monkeypatch.setattr(baselines_lab, "compose", compose)
    changes = {
        "_base": lambda name: network(name, numbers[name]),
        "_value": lambda seed: network("value", 1.0 + seed),
        "_train_forgetting": lambda seed: Path("forgetting"),
        "_matrix": types.SimpleNamespace(train=lambda training: Path(training.name)),
        "_work_dir": tmp_path,
    }
    for name, change in changes.items():
        monkeypatch.setattr(laboratory, name, change, raising=False)
    monkeypatch.setattr(baselines_lab, "load_value", lambda path: network(path.name, 7.0))
    tuned = {fine_tuned("L").name: network("L tuned", 15.0)}
    monkeypatch.setattr(baselines_lab, "load_language_model", tuned.__getitem__)
    laboratory._make(row)
    assert made == [(base, values, strengths)]


def record_of(found):
    names = [row.name for row in rows()]
    missing = [name for name in names if name not in found]
    return {"items_sha256": "now", "measured": found, "missing": missing}


def figures(nll, match, **more):
    return {"setting": "", "nll": nll, "exact_match": match, **more}


def test_the_section_has_means_over_seeds_settings_the_matrix_and_what_is_missing():
    found = {
        Row("L", "value", seed).name: figures(2.5 + seed / 10, 0.5, setting="") for seed in SEEDS
    }
    found[Row("L", "entropy").name] = figures(2.4, 0.75, setting="α = 1.25, scale 0.1")
    found[Row("L-continued", "diff").name] = figures(2.9, 0.25, new_exact_match=0.125)
    found[Row("L", "unlearned", strength=UNLEARNING[1]).name] = {
        "setting": "−0.5",
        "forgotten_match": 0.01,
        "retained_match": 0.88,
        "forgotten_nll": 9.0,
        "retained_nll": 0.5,
        "docstring_nll": 3.0,
    }
    matrix = {
        "L": figures(3.7, 0.0, items_sha256="now"),
        fine_tuned("L", 0).name: figures(2.46, 0.0, items_sha256="then"),
    }
    text = section(record_of(found), matrix)
    assert "| value, α = 1 | 2.600 ± 0.248 | 50.0% ± 0.0% |  |" in text
    assert "| value, strength by the base's entropy | 2.400 | 75.0% | α = 1.25, scale 0.1 |" in text
    assert "| diff vector of L fine-tuned | 2.900 | 25.0% | 12.5% |  |" in text
    assert "| 0.5 | 1.0% | 88.0% | 9.000 | 0.500 | 3.000 |" in text
    assert "| L alone | 3.700 | 0.0% |  |" in text
    assert "2.460" not in text  # of other items
    assert "### X: baselines" not in text
    assert f"Not measured yet ({len(list(rows())) - 6} of {len(list(rows()))} measur" in text
    assert "`L__soup_seed0`" in text.replace("\n", " ")
    assert "Not measured" not in section({**record_of(found), "missing": []}, {})


def test_the_section_replaces_itself_and_nothing_else(tmp_path):
    page = tmp_path / "experiments.md"
    update_page(tmp_path)
    assert not page.exists()
    page.write_text(f"# Experiments\n\nbefore\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    (tmp_path / RECORD).write_text('{"items_sha256": "now", "measured": {}, "missing": ["this"]}')
    update_page(tmp_path)
    text = page.read_text()
    assert text.startswith(f"# Experiments\n\nbefore\n\n{BEGIN}\n\n## Baselines")
    assert text.endswith(f"\n\n{END}\n\nafter\n")
    assert "`this`" in text
    assert "old" not in text
    update_page(tmp_path)
    assert page.read_text() == text
