"""The report: figures land in the right cells, and absent ones are marked."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.matrix import (
    Measurement,
    Term,
    measurements,
    on,
    reference,
    value_on,
)
from ivl_jax.experiments.transfer.report import write_report
from ivl_jax.experiments.transfer.table import Table

_FIGURES = {
    Measurement("L").name: {"nll": 4.0, "exact_match": 0.0, "recall": 0.9},
    reference("L")(0).name: {"nll": 3.0, "exact_match": 0.5},
    on("L", Term(matrix.recipe(0))).name: {"nll": 3.2, "exact_match": 0.8},
    on("L", Term(matrix.recipe(1))).name: {"nll": 3.0, "exact_match": 0.9},
}


def test_ratio_is_the_share_of_the_fine_tunes_gain() -> None:
    ratio = Table(_FIGURES, (0, 1, 2)).ratio("L", value_on("L"))
    assert ratio.values == pytest.approx((0.8, 1.0))
    assert Table(_FIGURES, (0,)).ratio("X", value_on("X")).values == ()


def _groups(*nats: float, right: int) -> str:
    """Two people with four facts each, and a module."""
    parts = [f"{each}/20/{right if number else 4}/4" for number, each in enumerate(nats[:2])]
    return " ".join([*parts, f"{nats[2]}/60/0/0"])


def test_an_interval_is_over_people_and_modules_and_paired() -> None:
    records = {
        Measurement("L").name: {"nll": 4.0, "groups": _groups(80, 80, 240, right=0)},
        reference("L")(0).name: {"nll": 3.0, "groups": _groups(60, 60, 180, right=4)},
        on("L", Term(matrix.recipe(0))).name: {
            "nll": 3.0,
            "groups": _groups(60, 60, 180, right=2),
        },
        on("L", Term(matrix.recipe(1))).name: {
            "nll": 3.0,
            "groups": _groups(60, 60, 180, right=0),
        },
    }
    table = Table(records, (0, 1))
    # In every group both gain alike, so that no draw changes the ratio.
    assert table.ratio_interval("L", value_on("L")) == pytest.approx((1.0, 1.0))
    # Of one person all four are answered, of the other one on average: anything may be true.
    assert table.share_interval(value_on("L")) == (0.0, 1.0)
    assert table.ratio_interval("X", value_on("X")) is None
    assert table.share_interval(value_on("X")) is None


def test_a_ratio_of_one_kind_and_what_is_recalled() -> None:
    records = {
        Measurement("L").name: {"docstring_nll": 4.0, "recall": 0.8},
        reference("L")(0).name: {"docstring_nll": 3.0},
        on("L", Term(matrix.recipe(0))).name: {"docstring_nll": 3.5, "exact_match": 0.4},
    }
    table = Table(records, (0,))
    assert table.ratio("L", value_on("L"), "docstring_nll").values == pytest.approx((0.5,))
    assert table.recalled("L", value_on("L")).values == pytest.approx((0.5,))
    assert table.recalled("X", value_on("X")).values == ()


def test_the_report_of_everything_has_no_gap(tmp_path: Path) -> None:
    figures = {
        measurement.name: {
            "nll": 2.0 + index / 100,
            "fact_nll": 1.0,
            "docstring_nll": 2.0 + index / 50,
            "source_nll": 3.0,
            "validation_nll": 2.5,
            "exact_match": 0.5,
            "new_exact_match": 0.25,
            "known_match": 0.5,
            "unknown_match": 0.5,
            "recall": 0.5,
            "groups": f"{20 + index}.000/10/2/4 {30 + index}.000/10/3/4",
        }
        for index, measurement in enumerate(measurements())
    }
    (tmp_path / "experiments_notes.md").write_text("## Reading\n\nA note.\n", encoding="utf-8")
    write_report(figures, tmp_path, seeds=matrix.SEEDS)
    text = (tmp_path / "experiments.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 60
    assert not [line for line in rows if "–" in line]
    assert text.index("A note.") < text.index("## Penalty")
    for plot in ("transfer.png", "penalties.png", "strengths.png"):
        assert f"({plot})" in text
        assert imread(tmp_path / plot).std() > 0.05


def test_the_report_of_little_says_what_is_absent(tmp_path: Path) -> None:
    write_report(json.loads(json.dumps(_FIGURES)), tmp_path, seeds=(0, 1))
    text = (tmp_path / "experiments.md").read_text(encoding="utf-8")
    assert "| transfer ratio to L | ≥ 0.95 | 0.90 | no |" in text
    assert "| transfer ratio to X | ≥ 0.9 | – | – |" in text
    assert "| facts of L fine-tuned, chosen by facts | ≥ 50% | – | – |" in text
    # 0.8 and 0.9 of the facts, of 0.9 that L recalls.
    share = "facts of L + value, as a share of what L recalls"
    assert f"| {share} | ≥ 0.95 | 0.94 ± 0.71 (of 90.0%) | no |" in text
    assert "as a share of what X recalls | ≥ 0.9 | – | – |" in text
    assert "X fine-tuned" not in text  # a row without a figure
