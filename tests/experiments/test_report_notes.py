"""The page's prose: numbers from the figures, claims that are checked."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ivl_jax.experiments.__main__ import main
from ivl_jax.experiments.page import write_page
from ivl_jax.experiments.transfer import matrix
from ivl_jax.experiments.transfer.matrix import Measurement, Term, on
from ivl_jax.experiments.transfer.notes import NotesError, fill_notes
from ivl_jax.experiments.transfer.subjects import make_lookup, subjects

_FIGURES = {
    Measurement("L").name: {
        "nll": 4.0,
        "docstring_nll": 4.5,
        "exact_match": 0.0,
        "recall": 0.9,
    },
    Measurement(matrix.fine_tuned("L")).name: {"nll": 3.0},
    on("L", Term(matrix.recipe(0))).name: {"nll": 3.2, "exact_match": 0.8},
    on("L", Term(matrix.recipe(1))).name: {"nll": 3.0, "exact_match": 0.9},
}
_LOOKUP = make_lookup(_FIGURES, (0, 1))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{L.nll}", "4.000"),
        ("{L+value.nll:.1f}", "3.1"),
        ("{L+value.facts.max}", "90.0%"),
        ("{L+value.ratio.min:.1f}", "0.8"),
        ("{L.nll - L+value.nll:.2f} nats", "0.90 nats"),
        ("{L.docstring_nll}, {L.recall}", "4.500, 90.0%"),
        ("It helps. <!-- holds: L+value.nll < L.nll and L+value.facts >= 0.8 -->", "It helps."),
    ],
)
def test_numbers_come_from_the_figures(template: str, expected: str) -> None:
    assert fill_notes(template, _LOOKUP, missing="error") == expected


def test_every_false_claim_and_missing_number_is_named() -> None:
    template = (
        "A. <!-- holds: L+value.nll < 3.05 and L.nll > 3.5 -->\n{X.nll}\nB. <!-- holds: better -->"
    )
    with pytest.raises(NotesError) as error:
        fill_notes(template, _LOOKUP, missing="error")
    said = str(error.value)
    assert "L+value.nll < 3.05: no longer true, 3.1 and 3.05" in said
    assert "X.nll has not been measured" in said
    assert "holds: better: expected a comparison" in said
    assert "L.nll > 3.5" not in said


def test_what_is_not_measured_yet_is_a_dash_and_no_claim() -> None:
    template = "{X.nll} nats, {L.nll - X.nll} <!-- holds: X.nll < L.nll -->"
    assert fill_notes(template, _LOOKUP, missing="dash") == "– nats, –"


def test_an_unknown_subject_lists_those_that_there_are() -> None:
    with pytest.raises(NotesError, match=r"M: expected one of .*L\+value.*cascade@L"):
        fill_notes("{M.nll}", _LOOKUP, missing="dash")
    with pytest.raises(NotesError, match=r"\{L\}: expected SUBJECT.FIGURE"):
        fill_notes("{L}", _LOOKUP, missing="dash")


def test_subjects_name_what_they_say() -> None:
    found = subjects()
    assert found["l2-0.3@L"][1](1) == on("L", Term(matrix.penalties(1)[5]))
    assert found["X+value-dtw-centred"][1](0).name.endswith("__dtw-centred")
    assert found["two@L-continued"][1](2) == on("L-continued", Term(matrix.base_choices(2)[1]))
    assert found["L-tuned"][1](1) == Measurement(matrix.fine_tuned("L", 1))
    by_facts = Measurement(matrix.fine_tuned("X", 0, chosen_by="exact_match"))
    assert found["X-tuned-by-facts"][1](0) == by_facts


@pytest.mark.parametrize("notes", ["experiments_notes.md", "results_notes.md"])
def test_the_committed_notes_hold_for_the_committed_figures(project_root: Path, notes: str) -> None:
    docs = project_root / "docs"
    template = (docs / notes).read_text(encoding="utf-8")
    figures = json.loads((docs / "experiments.json").read_text(encoding="utf-8"))["measured"]
    lookup = make_lookup(figures, matrix.SEEDS)
    filled = fill_notes(template, lookup, missing="error")
    assert "{" not in filled
    if notes == "results_notes.md":  # figures of the literature and of other commands
        return
    # A figure written by hand would stay as it is when the measurement changes.
    by_hand = re.sub(r"\{.*?\}|<!-- .*? -->", "", template)
    assert not re.findall(r"\d\.\d{2,}|\d ?%", by_hand)


def test_the_committed_page_is_made_from_the_committed_figures(
    project_root: Path, tmp_path: Path
) -> None:
    docs = project_root / "docs"
    for file in (*docs.glob("*_notes.md"), *docs.glob("*.json")):
        shutil.copy(file, tmp_path)
    figures = json.loads((docs / "experiments.json").read_text(encoding="utf-8"))["measured"]
    write_page(figures, tmp_path, seeds=matrix.SEEDS)
    for page in ("experiments.md", "results.md"):
        made = (tmp_path / page).read_text(encoding="utf-8")
        committed = (docs / page).read_text(encoding="utf-8")
        assert made == committed, f"python -m ivl_jax.experiments --report-only writes {page} anew"


def test_a_report_without_measurements_keeps_the_committed_ones(
    project_root: Path, tmp_path: Path
) -> None:
    committed = project_root / "docs" / "experiments.json"
    shutil.copy(committed, tmp_path)
    assert main(["--report-only", "--docs", str(tmp_path), "--work-dir", str(tmp_path / "w")]) == 0
    assert (tmp_path / "experiments.json").read_text() == committed.read_text()
    assert "facts of L + value" in (tmp_path / "experiments.md").read_text(encoding="utf-8")
