"""The transfer report for people: what the figure shows, and what a calibration is said to be."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from ivl_jax.evaluation.calibration import CalibrationReport
from ivl_jax.evaluation.transfer_report import summarise
from ivl_jax.evaluation.transfer_view import plot, show_calibration
from tests.evaluation.transfer_scores import ROWS, report_of, synthetic


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a report; gives the figure."""
    figures = []
    save = Figure.savefig

    def saving(self, *arguments, **options):
        figures.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saving)

    def draw(report, **names):
        plot(report, tmp_path / "report.png", **({"base": "B", "values": ("V",)} | names))
        assert imread(tmp_path / "report.png").shape[0] > 500
        return figures[-1]

    return draw


def test_the_figure_names_the_models_and_the_gain_by_strength(drawn):
    found = report_of(best=0.75)
    figure = drawn(found, base="models/base", values=("runs/" + "long/" * 20 + "value", "W"))
    title = figure.get_suptitle()
    assert title.startswith("models/base with …")
    assert "long/value and W\nThe value networks help this base" in title
    curve = figure.axes[2]
    (line, *_) = curve.lines
    assert line.get_ydata() == pytest.approx([one.gain for one in found.strengths])
    assert line.get_ydata()[0] == 0
    (band,) = curve.collections
    low, high = zip(*(one.gain_interval for one in found.strengths), strict=True)
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((min(low), max(high)))
    assert curve.get_title() == (
        "Gain by strength: 0.75 × the given one is reliably better (dotted line)"
    )
    (legend,) = figure.legends
    said = " ".join(text.get_text() for text in legend.get_texts())
    assert "gain" in said
    assert "loss" in said
    assert "bars: 95 %" in said


def test_where_nothing_is_better_the_given_strength_is_kept(drawn):
    curve = drawn(report_of(best=1.0)).axes[2]
    assert curve.get_title() == "Gain by strength: keep the given one"
    assert len(curve.lines) == 2, "the gains and 0, no marker"


def test_with_few_dialogues_the_figure_has_no_interval(drawn):
    figure = drawn(report_of(row_gains=np.array([0.4, 0.5, -0.1])))
    assert not figure.axes[2].collections
    assert len(figure.axes[2].lines) == 2, "the gains and 0, no marker"
    assert not any(axes.containers and axes.containers[0].errorbar for axes in figure.axes[:2])
    assert "95 %" not in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_the_figure_shows_a_report_with_empty_groups(drawn):
    tokens, nlls = synthetic()
    same = tokens._replace(entropy=np.full(len(tokens.row), 0.05))
    drawn(summarise(same, nlls, names=["a"] * ROWS))


@pytest.mark.parametrize(("nll", "better"), [(1.9, True), (2.0, False), (2.1, False)])
def test_a_calibration_that_is_no_better_on_unseen_dialogues_is_not_advised(nll, better):
    console = Console(record=True, file=io.StringIO(), width=400)
    show_calibration(CalibrationReport((0.7,), 1.1, given_nll=2.0, nll=nll), console)
    said = "no better on unseen dialogues: keep the given strength"
    assert (said in console.export_text()) == (not better)
