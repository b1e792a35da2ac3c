"""N-grams as a draft are measured on real texts, which must be those without a draft."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import chat_prompts, ngram
from benchmarks.chat_prompts import CODE_EDITS, EXPLANATIONS, WORD_PROBLEMS, find_word_problems
from benchmarks.report import Options
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.generation import Generation
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.weights.language_model import load_language_model


@pytest.fixture(scope="module")
def stories(stories260k_dir: Path) -> ComposedModel:
    return compose(load_language_model(stories260k_dir))


def _generation(*token_ids: int, accepted: int = 0) -> Generation:
    text = " ".join(map(str, token_ids))
    return Generation(text, token_ids, "length", prompt_tokens=1, accepted_tokens=accepted)


def test_without_the_real_model_everything_is_skipped_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SMOLLM2_FOLDER", str(tmp_path))
    report = ngram.run(Options())
    assert (report.rows, report.failed) == ([], {})
    assert "SMOLLM2_FOLDER does not name a folder" in report.skipped["everything"]


def test_accepted_tokens_take_no_step() -> None:
    assert ngram.tokens_per_step([_generation(1, 2, 3)]) == 1
    rows = [_generation(*range(8), accepted=5), _generation(*range(4), accepted=1)]
    assert ngram.tokens_per_step(rows) == 2


def test_prompts_are_as_many_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(CODE_EDITS) == 10
    assert all(edit.count("```") == 2 for edit in CODE_EDITS)
    assert len(set(EXPLANATIONS)) == 16
    monkeypatch.setattr(chat_prompts, "_GSM8K", Path("absent"))
    found = find_word_problems(3)
    assert found.texts == WORD_PROBLEMS[:3]
    assert "GSM8K" in found.source


def test_word_problems_are_gsm8ks_where_it_is_at_hand(gsm8k_dir: Path) -> None:
    found = find_word_problems(8)
    assert found.source == "GSM8K"
    assert len(set(found.texts)) == 8
    assert not set(found.texts) & set(WORD_PROBLEMS)


@pytest.mark.slow
def test_a_value_network_of_the_bases_layers_changes_no_text_by_being_drafted_for(
    stories260k_dir: Path,
) -> None:
    again = "Lily had a red ball. Tom had a blue ball. Lily had a red ball. Tom had a"
    plan = ngram.Plan(prompts=1, new_tokens=16, batches=(1,), repeats=1)
    alone, with_value = ngram.make_models(stories260k_dir)
    assert alone.drafted.params.base is alone.plain.params.base
    (value,) = with_value.plain.values
    assert value.arch.num_hidden_layers == 3
    (row,) = ngram.rows_of(with_value, "repetition", [again], 1, plan)
    found = re.fullmatch(
        r"repetition, base and value network, batch 1: (\d+) of (\d+) accepted, "
        r"(\d\.\d\d) tokens per step",
        row.name,
    )
    assert found is not None
    accepted, proposed = int(found[1]), int(found[2])
    assert 0 <= accepted <= proposed
    assert (float(found[3]) > 1) == (accepted > 0)
    assert row.peer is not None


def test_texts_that_differ_are_an_error_unless_two_tokens_are_equally_likely(
    stories: ComposedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stories.generate("Once upon a time", max_new_tokens=6)
    likeliest = stories.generate("Once upon a time", max_new_tokens=6, log_probs=2).log_probs
    assert likeliest is not None
    second = likeliest[3].top[1][0]
    other = replace(plain, token_ids=(*plain.token_ids[:3], second, 5, 5))
    count = ngram.count_same
    prompts = ["Once upon a time"]
    assert count(stories, prompts, {"plain": [plain], "drafted": [plain]}) == 1
    with pytest.raises(RuntimeError, match="the text with n-grams differs from the one without"):
        count(stories, prompts, {"plain": [plain], "drafted": [other]})
    monkeypatch.setattr(ngram, "_NEAR_TIE", 100.0)
    assert count(stories, prompts, {"plain": [plain], "drafted": [other]}) == 0
    third = replace(plain, token_ids=(*plain.token_ids[:3], 7, 5, 5))
    assert 7 not in (plain.token_ids[3], second)
    with pytest.raises(RuntimeError, match="the text with n-grams differs"):
        count(stories, prompts, {"plain": [plain], "drafted": [third]})
