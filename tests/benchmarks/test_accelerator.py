"""The accelerator check runs here scaled down, and a part that fails loses no other."""

import math

import pytest

from benchmarks import accelerator
from benchmarks.report import Options, to_json


def test_parts_without_time_are_named_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check = accelerator._Check(accelerator._SMALL)
    monkeypatch.setattr(accelerator, "_SECONDS", 0)
    check.run("late", lambda _: pytest.fail("it ran"))
    assert check.failed == {"late": "not run: the parts before it took more than 0 s"}


@pytest.mark.slow
def test_every_part_but_the_demo_runs_scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    # A part that fails in the middle of all: those after it run, what it lacks is left out.
    monkeypatch.setattr(accelerator, "_PARTS", {"broken": broken, **accelerator._PARTS})
    report = accelerator.run(Options(quick=True))
    assert report.failed == {"broken": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    rows = {row.name: row for row in report.rows}
    assert all(math.isfinite(row.figures.median) for row in rows.values())
    decoding = rows["composed decoding, batch 2"]
    assert decoding.fraction_of_limit is not None
    assert decoding.figures.median > 0
    training = rows["training step, 2 × 32 tokens"]
    assert training.fraction_of_limit is not None
    assert rows["training step, 1 × 64 tokens"].figures.median > 0
    assert rows["composed decoding, int8 base, batch 1"].figures.median > 0
    drafted = rows["composed decoding with a draft, 0.8 accepted, batch 1"]
    assert drafted.peer is not None
    assert rows["attention, plain: error of gradients"].figures.median < 1e-5
    assert "the demo" not in rows
    assert report.shapes["scaled down"] is True
    record = to_json({"accelerator": report}, failures={}, options=Options(True), setting={})
    assert len(record["rows"]) == len(report.rows)
