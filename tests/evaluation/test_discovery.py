"""An evaluation is one file: found in the package's folder, or named by its module."""

import subprocess
import sys

import pytest

import ivl_jax.evaluation
from ivl_jax.config import ConfigError
from ivl_jax.evaluation.__main__ import main
from ivl_jax.evaluation.discovery import find_evaluations, import_evaluation

NEW = '''
"""Counts letters."""

from dataclasses import dataclass, field

from ivl_jax.config.annotations import Inline
from ivl_jax.evaluation.flags import ModelFlags


@dataclass(frozen=True)
class Flags:
    """Letters of the base's name."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    letter: str = "a"
    """Which letter counts."""


def run(flags: Flags) -> None:
    print(flags.model.composed.base.count(flags.letter), flags.model.composed.strength)
'''


@pytest.fixture
def folder_of_evaluations(tmp_path, monkeypatch):
    """A folder that Python takes for more of the package `ivl_jax.evaluation`."""
    monkeypatch.setattr(
        ivl_jax.evaluation, "__path__", [*ivl_jax.evaluation.__path__, str(tmp_path)]
    )
    yield tmp_path
    sys.modules.pop("ivl_jax.evaluation.count_letters", None)


def test_every_file_that_defines_flags_and_run_is_found_and_no_other_is_imported(project_root):
    code = (
        "import sys\nfrom ivl_jax.evaluation.discovery import find_evaluations\n"
        "print(*find_evaluations())\n"
        "sys.exit(str({'jax', 'numpy', 'transformers'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
    assert {"gsm8k", "likelihood", "mt-bench", "toxigen", "transfer"} <= set(done.stdout.split())
    assert not {"loading", "scoring", "harness-command"} & set(done.stdout.split())


def test_a_new_file_in_the_folder_is_an_evaluation(folder_of_evaluations):
    (folder_of_evaluations / "count_letters.py").write_text(NEW)
    (folder_of_evaluations / "helper.py").write_text("def run(flags):\n    raise SystemExit\n")
    found = find_evaluations(folder_of_evaluations)
    assert list(found) == ["count-letters"]
    assert found["count-letters"].flags().letter == "a"


def test_an_evaluation_from_elsewhere_runs_by_the_name_of_its_module(tmp_path, monkeypatch, capsys):
    package = tmp_path / "my_evaluations"
    package.mkdir()
    (package / "count.py").write_text(NEW)
    (package / "broken.py").write_text("import a_module_that_is_absent\n")
    (package / "nothing.py").write_text("def run(flags): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["my_evaluations.count", "--base", "banana", "--strength", "2"]) == 0
    assert capsys.readouterr().out == "3 (2.0,)\n"
    with pytest.raises(SystemExit):
        main(["my_evaluations.count", "--help"])
    assert "Which letter counts." in capsys.readouterr().out
    assert main(["my_evaluations.nothing"]) == 2
    assert "must define a dataclass Flags and a function run(flags)" in capsys.readouterr().err
    assert main(["my_evaluations.absent"]) == 2
    assert "neither an evaluation (gsm8k, likelihood" in capsys.readouterr().err
    # What the user's own module lacks is said as it is.
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_absent"):
        import_evaluation("my_evaluations.broken")
    with pytest.raises(ConfigError, match="is not an evaluation"):
        import_evaluation("json")


def test_help_lists_every_evaluation_with_its_first_line(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, evaluation in find_evaluations().items():
        assert f"• {name}" in shown
        assert (evaluation.flags.__doc__ or "").split(":")[0] in shown
    assert "• lm-eval" in shown
