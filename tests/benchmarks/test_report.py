"""Ratios, targets and files of benchmarks say what was measured."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import Options, Peer, Report, Row, Target, show, to_json, write_json
from benchmarks.timing import Figures


def _row(median: float, **fields) -> Row:
    return Row("what", Figures(median, 0.5), "s", **fields)


def test_ratio_is_how_many_times_better_than_the_peer() -> None:
    assert _row(2.0, peer=Peer("loop", 8.0)).ratio == 4
    assert _row(8.0, peer=Peer("loop", 2.0), better="higher").ratio == 4
    assert _row(2.0).ratio is None


def test_fraction_of_limit_is_below_one_on_either_side_of_it() -> None:
    assert _row(50.0, limit=100.0, better="higher").fraction_of_limit == 0.5
    assert _row(2.0, limit=1.0).fraction_of_limit == 0.5
    assert _row(2.0).fraction_of_limit is None


@pytest.mark.parametrize(
    ("row", "target", "met"),
    [
        (_row(2.0, target=Target("median", 2.0)), "median <= 2", True),
        (_row(2.1, target=Target("median", 2.0)), "median <= 2", False),
        (_row(2.0, better="higher", target=Target("median", 2.0)), "median >= 2", True),
        (_row(1.9, better="higher", target=Target("median", 2.0)), "median >= 2", False),
        (_row(1.0, peer=Peer("p", 2.5), target=Target("ratio", 2.5)), "ratio >= 2.5", True),
        (_row(1.0, peer=Peer("p", 2.4), target=Target("ratio", 2.5)), "ratio >= 2.5", False),
        (
            _row(7.0, better="higher", limit=10.0, target=Target("fraction_of_limit", 0.8)),
            "fraction_of_limit >= 0.8",
            False,
        ),
        (_row(2.0), None, None),
    ],
)
def test_target_is_met_on_the_right_side_of_its_bound(
    row: Row, target: str | None, met: bool | None
) -> None:
    assert row.to_json()["target"] == target
    assert row.met is met


def test_target_of_a_figure_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="what: its target is of the ratio, but it has no peer"):
        _row(1.0, target=Target("ratio", 2.0))
    with pytest.raises(ValueError, match="fraction_of_limit, but it has no limit"):
        _row(1.0, target=Target("fraction_of_limit", 0.5))


def _report(*rows: Row) -> Report:
    return Report(rows, dtype="float32", shapes={"batch": 1})


def test_file_holds_the_rows_of_all_benchmarks_and_their_setting(tmp_path: Path) -> None:
    record = to_json(
        {"a": _report(_row(1.0)), "b": _report(_row(2.0, target=Target("median", 3)))},
        failures={},
        options=Options(quick=True),
        setting={"device": "abacus"},
    )
    write_json(tmp_path / "x.json", record)
    read = json.loads((tmp_path / "x.json").read_text())
    assert [(row["benchmark"], row["median"], row["met"]) for row in read["rows"]] == [
        ("a", 1.0, None),
        ("b", 2.0, True),
    ]
    issue = {"name", "median", "spread", "unit", "peer", "ratio", "fraction_of_limit", "target"}
    assert issue <= set(read["rows"][0])
    assert read["targets_met"] is True
    assert read["setting"] == {
        "device": "abacus",
        "quick": True,
        "dtype": {"a": "float32", "b": "float32"},
        "shapes": {"a": {"batch": 1}, "b": {"batch": 1}},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("median", "failures", "met"), [(1.0, {}, True), (9.0, {}, False), (1.0, {"b": "x"}, False)]
)
def test_targets_are_met_where_all_rows_reach_theirs_and_nothing_failed(
    median: float, failures: dict[str, str], met: bool
) -> None:
    report = _report(_row(5.0), _row(median, target=Target("median", 2)))
    record = to_json({"a": report}, failures=failures, options=Options(), setting={})
    assert record["targets_met"] is met


def test_table_says_which_target_is_missed() -> None:
    console = Console(record=True, width=150)
    peer = Peer("a [loop]", 4.0)
    show("x", _report(_row(2.0, peer=peer, target=Target("ratio", 3))), console)
    text = console.export_text()
    assert "a [loop]: 4 s" in text
    assert "ratio >= 3" in text
    assert "2 ×" in text
    assert "NO" in text
