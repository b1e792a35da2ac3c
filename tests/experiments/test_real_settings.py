"""Budgets of the study of a real model."""

import dataclasses
import re

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import ConfigError
from ivl_jax.experiments.real.settings import ABOUT, QUICK, STAGES, Budget, quick
from ivl_jax.experiments.real.study import description, main


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dialogues": 0}, "--dialogues must be > 0, got 0"),
        ({"healing_rate": -1.0}, "--healing-rate must be > 0"),
        ({"penalty": -0.5}, "--penalty must be ≥ 0"),
        ({"value_tokens": 4095}, "at least one batch, 8 rows of 512 = 4,096 tokens"),
    ],
)
def test_budgets_that_cannot_work_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**changed)


def test_no_penalty_is_a_budget():
    assert Budget(penalty=0.0).penalty == 0.0


def test_the_quick_budget_is_small_but_for_what_was_asked_for():
    assert quick(Budget()) == QUICK
    assert quick(Budget(held_out=7)) == dataclasses.replace(QUICK, held_out=7)
    for tokens in (QUICK.healing_tokens, QUICK.value_tokens, QUICK.tuning_tokens):
        assert QUICK.steps(tokens) == 2


def test_help_says_what_each_stage_takes():
    text = description()
    assert set(ABOUT) == set(STAGES)
    assert all(f"{stage} " in text and about in text for stage, about in ABOUT.items())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "--model is missing: .*hub id HuggingFaceTB/SmolLM2-135M-Instruct"),
        (["--model", "/no/such/folder"], 1, "/no/such/folder: no such folder"),
        (
            ["--model", str(family_folder("L")), "--first-layers", "1", "--last-layers", "1"],
            2,
            "--gsm8k is missing: .*train.jsonl and test.jsonl.*github.com/openai/grade-school-math",
        ),
    ],
)
def test_a_study_says_how_to_get_what_it_needs(capsys, arguments, status, message, tmp_path):
    assert main([*arguments, "--work-dir", str(tmp_path), "--docs", str(tmp_path)]) == status
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr().err
    assert re.search(message, captured), captured
    assert ".." not in captured, "nothing outside of the project is taken for granted"
