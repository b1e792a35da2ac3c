"""A benchmark is one file, found by itself."""

import sys
from pathlib import Path

import pytest

from benchmarks.discovery import BenchmarkError, find_benchmarks, read_reference

_RUN = "def run(options):\n    raise AssertionError('not to be run')\n"


def test_a_new_file_is_a_benchmark_and_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "later.py").write_text(f'import no_such_module\n\nABOUT = "speed"\n\n{_RUN}')
    (tmp_path / "earlier.py").write_text(f'ABOUT = "memory"\n\n{_RUN}')
    (tmp_path / "helper.py").write_text("import no_such_module\n\n\ndef running():\n    pass\n")
    (tmp_path / "__main__.py").write_text(_RUN)
    found = find_benchmarks(tmp_path, package="mine")
    assert {name: one.about for name, one in found.items()} == {
        "earlier": "memory",
        "later": "speed",
    }
    assert list(found) == ["earlier", "later"]
    assert found["later"].module == "mine.later"
    assert "mine.later" not in sys.modules


@pytest.mark.parametrize(
    ("text", "only"), [(_RUN, "run"), ('ABOUT = "x"\n', "ABOUT"), (f"ABOUT = 1\n{_RUN}", "run")]
)
def test_half_a_benchmark_is_an_error(tmp_path: Path, text: str, only: str) -> None:
    (tmp_path / "half.py").write_text(text)
    with pytest.raises(BenchmarkError, match=rf"half\.py: .* it has only {only}$"):
        find_benchmarks(tmp_path)


def test_the_projects_benchmarks_are_found() -> None:
    assert {"decode", "batch", "train", "vocabulary"} <= set(find_benchmarks())
    assert {"timing", "report", "page", "shapes"}.isdisjoint(find_benchmarks())


def test_a_function_from_elsewhere_is_described_by_its_docstring() -> None:
    found = read_reference("benchmarks.decode:run")
    assert found.about == "Decode with every contender in turn."
    assert found.load().__name__ == "run"
