"""One command runs any benchmarks, keeps what was measured, and says what failed."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import __main__ as command
from benchmarks.discovery import Benchmark, find_benchmarks
from benchmarks.report import Options, Report, Row, Target
from benchmarks.timing import Figures


@pytest.fixture
def fake_benchmarks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options]]:
    """One meets its target, one fails, one misses, one fails in part; gives the calls."""
    calls = []

    def make(name: str, median: float) -> ModuleType:
        def run(options: Options) -> Report:
            calls.append((name, options))
            if name == "broken":
                raise RuntimeError("no such machine")
            row = Row("time", Figures(median, 0.0), "s", target=Target("median", 2.0))
            failed = {"demo": "not run"} if name == "partial" else {}
            return Report([row], dtype="float32", shapes={}, failed=failed)

        module = ModuleType(name)
        module.run = run  # type: ignore[attr-defined]
        return module

    fakes = {"good": 1.0, "broken": 0.0, "slow": 3.0, "partial": 1.0}
    found = {name: Benchmark("about", f"benchmarks.{name}") for name in fakes}
    monkeypatch.setattr(command, "find_benchmarks", lambda: found)
    for name, median in fakes.items():
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", make(name, median))
    return calls


def test_one_benchmark_writes_its_rows_and_setting(
    fake_benchmarks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    assert command.main(["good", "--quick", "--json", str(file)]) == 0
    assert fake_benchmarks == [("good", Options(quick=True))]
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["rows"]] == ["time"]
    assert record["targets_met"] is True
    setting = record["setting"]
    assert {"device", "threads", "versions", "commit", "dtype", "shapes"} <= set(setting)
    assert "jax" in setting["versions"]
    assert "targets met: yes" in capsys.readouterr().out


def test_a_part_that_failed_is_named_and_its_rows_are_kept(
    fake_benchmarks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    assert command.main(["partial", "--json", str(file)]) == 1
    record = json.loads(file.read_text())
    assert record["failures"] == {"partial, demo": "not run"}
    assert len(record["rows"]) == 1
    assert "partial, demo: not run" in capsys.readouterr().out


def test_a_part_that_was_skipped_says_why_and_is_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: Options) -> Report:
        return Report([], dtype="float32", shapes={}, skipped={"the peer": "it is not installed"})

    module = ModuleType("elsewhere")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.elsewhere", module)
    found = {"elsewhere": Benchmark("about", "benchmarks.elsewhere")}
    monkeypatch.setattr(command, "find_benchmarks", lambda: found)
    file = tmp_path / "x.json"
    assert command.main(["elsewhere", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["skipped"] == {"elsewhere, the peer": "it is not installed"}
    assert record["failures"] == {}
    assert "elsewhere, the peer: skipped: it is not installed" in capsys.readouterr().out


def test_a_missed_target_is_reported_and_is_not_a_failure(fake_benchmarks, capsys) -> None:
    assert command.main(["slow"]) == 0
    assert "targets met: NO" in capsys.readouterr().out


def test_one_that_fails_does_not_lose_the_others(fake_benchmarks, tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.json"
    assert command.main(["all", "--json", str(file)]) == 1
    assert [name for name, _ in fake_benchmarks] == ["good", "broken", "slow", "partial"]
    record = json.loads(file.read_text())
    assert [row["benchmark"] for row in record["rows"]] == ["good", "slow", "partial"]
    assert record["failures"] == {
        "broken": "RuntimeError: no such machine",
        "partial, demo": "not run",
    }
    assert record["targets_met"] is False
    assert "no such machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing"],
            "no benchmark 'nothing': choose from good, broken, slow, partial, all, or give your",
        ),
        (["good", "no_such_module:run"], "no_such_module:run: expected MODULE:FUNCTION: No module"),
        (["json:run"], "json:run: expected MODULE:FUNCTION: module 'json' has no attribute 'run'"),
        ([], "required: NAME"),
        (["good", "--json", "absent/x.json"], "in an existing folder"),
        (["good", "--json", "."], "expected the name of a file"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    fake_benchmarks, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
    assert fake_benchmarks == []


def test_a_function_of_ones_own_is_named_by_its_module(
    fake_benchmarks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_benchmarks.py").write_text(
        "from benchmarks.report import Report\n\n"
        "def empty(options):\n"
        '    """Nothing, in no time."""\n'
        '    return Report([], dtype="none", shapes={"quick": options.quick})\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "x.json"
    assert command.main(["my_benchmarks:empty", "good", "--quick", "--json", str(file)]) == 0
    shapes = json.loads(file.read_text())["setting"]["shapes"]
    assert shapes == {"my_benchmarks:empty": {"quick": True}, "good": {}}


@pytest.mark.parametrize("name", find_benchmarks())
def test_every_benchmark_that_is_found_can_run(name: str) -> None:
    assert callable(find_benchmarks()[name].load())
