"""The section on a real model: only what has been measured, and only the section of the page."""

import dataclasses
import json

import pytest

from ivl_jax.experiments.real.report import (
    BEGIN,
    RECORD,
    real_section,
    recovered,
    update_real_section,
)
from ivl_jax.experiments.real.settings import Budget
from ivl_jax.experiments.real.subjects import SUBJECTS


def figures(gsm8k, docstring, right=3):
    return {
        "nll": {"gsm8k": gsm8k, "docstring": docstring},
        "questions": {"gsm8k": 200, "docstring": 150},
        "answered": 100,
        "right": right,
        "interval": [0.01, 0.0852],
    }


TUNED = {
    "target_lora": {"best": 120, "steps": 244, "nll": 1.125},
    "target_full": {"best": 60, "steps": 244, "nll": 1.25},
}


def record_of(measured, tuned=None):
    return {
        "settings": dataclasses.asdict(Budget(healing_tokens=81_920, rank=7, gsm8k_questions=1234)),
        "models": {
            "target": {"layers": 30, "parameters": 134_515_008},
            "donor": {"layers": 10, "parameters": 63_718_848},
        },
        "tuned": TUNED if tuned is None else tuned,
        "measured": measured,
        "missing": [name for name in SUBJECTS if name not in measured],
    }


MEASURED = {
    "donor": figures(2.5, 4.5),
    "target": figures(2.0, 4.0),
    "target_value": figures(1.25, 3.0, right=9),
    "target_lora": figures(1.0, 2.25),
    "target_full": figures(1.5, 2.0),
}


def test_what_is_recovered_is_measured_by_the_fine_tuning_that_is_best_on_held_out_questions():
    record = record_of(MEASURED)
    assert recovered(record, "target_value", "gsm8k") == pytest.approx(0.75)
    # Full fine-tuning is better on the test questions, by which nothing is chosen.
    assert recovered(record, "target_value", "docstring") == pytest.approx(1 / 1.75)
    assert recovered(record, "target_full", "gsm8k") == pytest.approx(0.5)
    assert recovered(record, "target_proxy", "gsm8k") is None
    full = record_of(MEASURED, TUNED | {"target_full": TUNED["target_full"] | {"nll": 1.0}})
    assert recovered(full, "target_value", "docstring") == pytest.approx(0.5)
    unknown = record_of(MEASURED, {"target_lora": TUNED["target_lora"]})
    assert recovered(unknown, "target_value", "gsm8k") is None, "which is best is not known"
    untuned = {name: one for name, one in MEASURED.items() if name[7:] not in ("lora", "full")}
    assert recovered(record_of(untuned), "target_value", "gsm8k") is None
    worse = MEASURED | {"target_lora": figures(2.5, 2.0)}
    assert recovered(record_of(worse), "target_value", "gsm8k") is None


def test_the_table_has_a_row_per_measured_model_and_the_rest_is_named_as_missing():
    text = real_section(record_of(MEASURED))
    assert "| target + value | 1.250 | 3.000 | 0.75 | 0.57 | 9 of 100 (1.0% to 8.5%) |" in text
    assert "| donor | 2.500 | 4.500 | – | – | 3 of 100" in text
    assert text.count("\n| ") == len(MEASURED) + 2  # with the two lines of the head
    missing = text.partition("Not measured yet: ")[2]
    assert "donor + value" in missing
    assert "through a map" in missing.replace("\n", " ")
    assert "target + value;" not in missing


def test_the_introduction_quotes_the_settings_of_the_record():
    text = " ".join(real_section(record_of(MEASURED)).split())
    assert "134.5 M parameters, 30 layers" in text
    assert "63.7 M parameters" in text
    assert "20 steps of 8 rows of 512 tokens" in text
    assert "1234 questions of GSM8K and 1500 on docstrings" in text
    assert "LoRA of rank 7" in text


def test_the_best_steps_of_fine_tunings_are_shown_once_there_are_any():
    assert "at step" not in real_section(record_of(MEASURED, {}))
    text = " ".join(real_section(record_of(MEASURED)).split())
    assert "the target by LoRA at step 120 of 244 (1.125 nats)" in text
    assert "*Recovered* is relative to the target by LoRA" in text
    donor = {"donor_tuned": TUNED["target_lora"]}
    untuned = {"target": MEASURED["target"]}
    assert "is relative to" not in real_section(record_of(untuned, donor))


def test_nothing_is_shown_that_has_not_been_measured():
    text = real_section(record_of({}))
    assert "| model |" not in text
    assert "Not measured yet" in text


def test_only_the_section_of_the_page_changes(tmp_path):
    update_real_section(tmp_path)
    assert not (tmp_path / "experiments.md").exists(), "without a record nothing is written"
    page = "# Experiments\n\nbefore\n\n<!-- other -->\n\nkept\n"
    (tmp_path / "experiments.md").write_text(page)
    for nll in (2.0, 1.875):
        record = record_of({"target": figures(nll, 4.0)})
        (tmp_path / RECORD).write_text(json.dumps(record))
        update_real_section(tmp_path)
    text = (tmp_path / "experiments.md").read_text()
    assert text.startswith(page)
    assert text.count(BEGIN) == 1
    assert "1.875" in text
    assert "2.000" not in text
