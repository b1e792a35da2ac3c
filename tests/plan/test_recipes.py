"""The table of recipes is what their plans say."""

import dataclasses
from pathlib import Path

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.plan import __main__ as command
from ivl_jax.plan import decoding, training
from ivl_jax.plan.compiled import Compiled
from ivl_jax.plan.decoding import DecodingPlan
from ivl_jax.plan.recipes import read_recipes

_LIST = """\
[[recipes]]
config = "RUN"
machines = ["v5e-8", "7x-8"]
flags = ["--step.batch-size", "64"]

[[recipes]]
config = "RUN"
machines = ["v6e-1"]

[[decoding]]
config = "RUN"
machines = ["v5e-16"]
flags = ["--batch", "8", "--int8-base"]
"""


@pytest.fixture
def document(tmp_path):
    """A document and its list, with a config that has no models."""
    run = tmp_path / "run.toml"
    run.write_text(
        'run_dir = "runs/none"\n[base]\npath = "none"\n[value]\ninit = "base"\n'
        '[data]\ntrain = ["none.json"]\n'
    )
    (tmp_path / "machines.toml").write_text(_LIST.replace("RUN", str(run)))
    (tmp_path / "machines.md").write_text(
        "before\n<!-- recipes -->\nold\n<!-- /recipes -->\n"
        "between\n<!-- decoding -->\nold\n<!-- /decoding -->\nafter\n"
    )
    return tmp_path / "machines.md"


@pytest.fixture
def decoded(monkeypatch):
    """Plans of decoding are made up; those asked for, in order."""
    compiled = Compiled(fits=True, temporaries=120_000_000, peak=5_000_000_000)
    asked = []

    def plan_decoding(config, machine, *, run):
        asked.append((config.batch, config.model.int8_base, run is not None))
        return DecodingPlan(
            8, 4 * 10**9, 10**9, 10**9, compiled, compiled, machine.memory, 6 * 10**9, 1234.5
        )

    monkeypatch.setattr(decoding, "plan_decoding", plan_decoding)
    return asked


def test_the_tables_are_written_with_a_row_per_machine(
    document, plan, decoded, monkeypatch, capsys
):
    def plan_training(config, machine):
        fits = machine.name != "v6e-1"
        found = dataclasses.replace(plan, peak=12_340_000_000, available=machine.memory, fits=fits)
        return [found, dataclasses.replace(found, peak=1)]

    monkeypatch.setattr(training, "plan_training", plan_training)
    for _ in range(2):  # the table replaces itself
        assert command._plan(["recipes", str(document)]) == command.DOES_NOT_FIT
    text = document.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[2] for row in rows] == ["v5e-8", "tpu7x-8", "v6e-1", "v5e-16"]
    assert "| `--step.batch-size 64` | v5e-8 | 64 × 1,024 | 1 | 12.3 GB | 16.9 GB |" in rows[0]
    assert "0.75 s (interconnect)" in rows[0]
    assert "12.3 GB, **does not fit**" in rows[2]
    assert text.startswith("before\n")
    assert rows[3].endswith(
        "| `--batch 8 --int8-base` | v5e-16 | 8 × 2,048 | 5.0 GB | 1.00 GB | 0.12 GB | 5.0 GB "
        "| 16.9 GB | 1,234 |"
    )
    assert decoded == [(8, True, True)] * 2
    assert "<!-- /recipes -->\nbetween\n<!-- decoding -->\n" in text
    assert text.endswith("<!-- /decoding -->\nafter\n")
    assert "old" not in text
    assert capsys.readouterr().out.splitlines()[:4] == rows


def test_a_recipe_that_does_not_divide_is_named(document, monkeypatch):
    def plan_training(config, machine):
        raise ConfigError("mesh: too small")

    monkeypatch.setattr(training, "plan_training", plan_training)
    with pytest.raises(ConfigError, match=r"run\.toml on v5e-8: mesh: too small"):
        command._plan(["recipes", str(document)])
    assert "old" in document.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipes = 3", r"no \[\[recipes\]\]"),
        ("[[training]]", "expected recipes and decoding, found training"),
        ('[[decoding]]\nconfig = "a"', "decoding 1: expected config, machines.*found config"),
        ("recipes = [", "machines.toml: "),
        ('[[recipes]]\nconfig = "a"', "recipes 1: expected config, machines.*found config"),
        (
            '[[recipes]]\nconfig = "a"\nmachines = ["v9"]',
            "recipes 1: machines: v9: not a known machine",
        ),
        ('[[recipes]]\nconfig = "a"\nmachines = ["v5e-8"]\non = 1', "found config, machines, on"),
    ],
)
def test_a_list_that_is_none_is_refused(document, text, message):
    document.with_suffix(".toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        command._plan(["recipes", str(document)])


@pytest.mark.usefixtures("decoded")
def test_a_document_needs_a_place_for_each_table(document, plan, monkeypatch):
    monkeypatch.setattr(training, "plan_training", lambda config, machine: [plan])
    document.write_text("text")
    with pytest.raises(ConfigError, match="no place for a table, between <!-- recipes -->"):
        command._plan(["recipes", str(document)])
    document.write_text("<!-- recipes --><!-- /recipes -->")
    with pytest.raises(ConfigError, match="no place for a table, between <!-- decoding -->"):
        command._plan(["recipes", str(document)])
    assert document.read_text() == "<!-- recipes --><!-- /recipes -->"
    with pytest.raises(ConfigError, match="name the document"):
        command._plan(["recipes"])


def test_the_shipped_document_has_a_row_per_recipe(project_root: Path):
    document = project_root / "docs/accelerators.md"
    rows = [
        line.strip("| ").split(" | ")[:3]
        for line in document.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `configs/")
    ]
    assert [[cell.strip(" `") for cell in row] for row in rows] == [
        [recipe.config, " ".join(recipe.flags), recipe.machine.name]
        for recipes in read_recipes(document.with_suffix(".toml")).values()
        for recipe in recipes
    ]


def test_the_shipped_list_names_shipped_configs(project_root: Path):
    recipes = read_recipes(project_root / "docs/accelerators.toml")
    assert {
        recipe.config
        for recipe in (*recipes["recipes"], *recipes["decoding"])
        if not (project_root / recipe.config).exists()
    } == set()
