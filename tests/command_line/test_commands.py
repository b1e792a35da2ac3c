"""Every command line of the project ends as the guard says, and has a version."""

import importlib
import importlib.util
import sys
import tempfile
import tomllib

import pytest

from ivl_jax import __main__ as listing
from ivl_jax.assets import config_file

# Module of the command line → the function that does its work.
COMMANDS = {
    "ivl_jax.commands.train": "_train",
    "ivl_jax.commands.infer": "_infer",
    "ivl_jax.commands.serve": "_serve",
    "ivl_jax.checkpoint.__main__": "_run",
    "ivl_jax.evaluation.__main__": "_run",
    "ivl_jax.experiments.__main__": "_run",
    "ivl_jax.experiments.baselines.study": "_run",
    "ivl_jax.experiments.family.continued": "_run",
    "ivl_jax.experiments.demo": "_run",
    "ivl_jax.experiments.finetune_sweep": "_run",
    "ivl_jax.experiments.lifts.study": "_run",
    "ivl_jax.experiments.demo_post_training": "_run",
    "ivl_jax.experiments.post_training.study": "_run",
    "ivl_jax.experiments.pretrain_family": "_run",
    "ivl_jax.experiments.real.study": "_run",
    "ivl_jax.experiments.vocabulary_maps": "_run",
    "ivl_jax.plan.__main__": "_plan",
    "ivl_jax.vocabulary.__main__": "_run",
    "benchmarks.__main__": "_run",
}


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_line_has_a_version_and_ends_in_one_line(
    module, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", ["it", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("ivl_jax ")

    def fail(*_):
        raise KeyError("lost")

    monkeypatch.setattr(f"{module}.{COMMANDS[module]}", fail)
    monkeypatch.setattr(sys, "argv", ["it"])
    assert main() == (3 if "plan" in module else 1)  # 1: planned, and does not fit
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "unexpected KeyError: 'lost'; the traceback is in " in said


def test_every_command_line_is_in_the_table(project_root):
    sources = [*project_root.glob("ivl_jax/**/*.py"), *project_root.glob("benchmarks/*.py")]
    found = {
        ".".join(path.relative_to(project_root).with_suffix("").parts)
        for path in sources
        if "run_command(" in path.read_text(encoding="utf-8") and path.stem != "guard"
    }
    assert found == set(COMMANDS)


def test_the_package_lists_commands_that_exist(monkeypatch, capsys, project_root):
    scripts = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]["scripts"]
    monkeypatch.setattr(sys, "argv", ["ivl_jax"])
    assert listing.main() == 0
    shown = capsys.readouterr().out
    for command in listing.COMMANDS:
        assert command in shown
        module = command.removeprefix("python -m ")
        name, _, function = scripts.get(command, f"{module}:main").partition(":")
        if importlib.util.find_spec(name).submodule_search_locations is not None:
            name += ".__main__"
        assert callable(getattr(importlib.import_module(name), function))
    assert set(scripts) <= set(listing.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["ivl_jax", "infer"])
    assert listing.main() == 2


def test_a_wheel_holds_what_the_demo_reads(project_root):
    """The config is next to the package in a clone, and inside it once it is installed."""
    assert config_file("demo.toml").is_file()
    build = tomllib.loads((project_root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    target = build["targets"]["wheel"]["force-include"]["configs"]
    assert target == "ivl_jax/assets/configs"
