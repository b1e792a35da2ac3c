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
from ivl_jax.experiments.transfer.report import Spread, Table, write_report

_FIGURES = {
    Measurement("L").name: {"nll": 4.0, "exact_match": 0.0, "recall": 0.9},
    reference("L")(0).name: {"nll": 3.0, "exact_match": 0.5},
    on("L", Term(matrix.recipe(0))).name: {"nll": 3.2, "exact_match": 0.8},
    on("L", Term(matrix.recipe(1))).name: {"nll": 3.0, "exact_match": 0.9},
}


def test_ratio_is_the_share_of_the_fine_tunes_gain() -> None:
    ratio = Table(_FIGURES, (0, 1, 2)).ratio("L", value_on("L"))
    assert ratio.values == pytest.approx((0.8, 1.0))
    assert ratio.show("{:.2f}") == "0.90 ± 0.10"
    assert Table(_FIGURES, (0,)).ratio("X", value_on("X")).values == ()


def test_a_single_seed_has_no_spread() -> None:
    assert Spread((1.5,)).show() == "1.500"
    assert Spread(()).show() == "–"


def test_the_report_of_everything_has_no_gap(tmp_path: Path) -> None:
    figures = {
        measurement.name: {
            "nll": 2.0 + index / 100,
            "validation_nll": 2.5,
            "exact_match": 0.5,
            "new_exact_match": 0.25,
            "recall": 0.5,
        }
        for index, measurement in enumerate(measurements())
    }
    (tmp_path / "experiments_notes.md").write_text("## Reading\n\nA note.\n", encoding="utf-8")
    write_report(figures, tmp_path, seeds=matrix.SEEDS)
    text = (tmp_path / "experiments.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    gaps = [line for line in rows if "–" in line and " − " not in line]
    assert not gaps
    assert text.endswith("A note.\n")
    for plot in ("transfer.png", "penalties.png", "strengths.png"):
        assert f"({plot})" in text
        assert imread(tmp_path / plot).std() > 0.05


def test_the_report_of_little_says_what_is_absent(tmp_path: Path) -> None:
    write_report(json.loads(json.dumps(_FIGURES)), tmp_path, seeds=(0, 1))
    text = (tmp_path / "experiments.md").read_text(encoding="utf-8")
    assert "| transfer ratio to L | ≥ 0.9 | 0.90 ± 0.10 | yes |" in text
    assert "| transfer ratio to X | ≥ 0.6 | – | – |" in text
    # 0.8 and 0.9 of the facts, of 0.9 that L recalls.
    share = "facts of L + value, as a share of what L recalls"
    assert f"| {share} | ≥ 0.95 | 0.94 ± 0.06 (of 90.0%) | no |" in text
    assert "as a share of what X recalls | ≥ 0.9 | – | – |" in text
