"""A missing extra skips tests with a reason; where the extra is required, it fails them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

_SKIP = 'pytest.importorskip("no_such_module", reason="the extra `torch` is not installed")'
_FILES = {
    "test_one.py": f"import pytest\n\ndef test_one():\n    {_SKIP}\n",
    "test_module.py": f"import pytest\n\n{_SKIP}\n\ndef test_two():\n    pass\n",
    "documented.py": '"""\n>>> 1\n1\n"""\nimport no_such_module\n',
}


def test_a_missing_extra_skips_tests_with_a_reason(project_root: Path, tmp_path: Path) -> None:
    code, output = _run(project_root, tmp_path, required="")
    assert code == 0, output
    assert "3 skipped" in output
    assert output.count("the extra `torch` is not installed") == 2
    assert "unable to import module" in output


def test_a_skip_for_want_of_a_required_extra_is_a_failure(
    project_root: Path, tmp_path: Path
) -> None:
    code, output = _run(project_root, tmp_path, required="dev,torch")
    assert code == 1, output
    assert "skipped" not in output
    assert "3 errors" in output, "a module with a test, its doctests, and another's doctests"
    assert "1 failed" in output
    assert output.count("IVL_REQUIRED_EXTRAS=dev,torch") >= 3


def test_a_skip_for_want_of_another_extra_stays_one(project_root: Path, tmp_path: Path) -> None:
    (tmp_path / "documented.py").write_text("")
    code, output = _run(project_root, tmp_path, required="dev,eval")
    assert code == 0, output
    assert "2 skipped" in output


def test_skips_name_extras_that_there_are(project_root: Path) -> None:
    project = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]
    named = {
        name
        for path in (project_root / "tests").rglob("test_*.py")
        for name in re.findall(r"the extra `([\w-]+)` is not installed", path.read_text())
    }
    assert {"torch", "eval"} <= named
    assert named <= set(project["optional-dependencies"])


def _run(project_root: Path, folder: Path, *, required: str) -> tuple[int, str]:
    """Run pytest on files that lack a module, under the project's own conftest."""
    shutil.copy(project_root / "conftest.py", folder)
    for name, text in _FILES.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    flags = ("--doctest-modules", "--doctest-ignore-import-errors", "-ra")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "--continue-on-collection-errors"],
        cwd=folder,
        env={
            **os.environ,
            "IVL_REQUIRED_EXTRAS": required,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr
