"""Forced decoding gives the log-probabilities of the distributions that tokens are drawn from."""

import numpy as np
import pytest
import scipy.special

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions, PromptTooLongError
from ivl_jax.decoding.score import score_continuations
from ivl_jax.evaluation.scoring import Row, score_rows
from tests.decoding.test_own_vocabulary import random_map, step_anew
from tests.decoding.tiny import language_model

PROMPTS = ["Once upon a ti", "", "naïve 水"]
CONTINUATIONS = [" there was a naïve 水", "x", "\n\ndef f(): return 1"]


@pytest.fixture(scope="module")
def base(stories260k_dir):
    return language_model(stories260k_dir, seed=0)


@pytest.fixture(scope="module")
def mapped(base):
    """A value of another vocabulary, and one of the base's own."""
    other = language_model(family_folder("X"), seed=2, context=40)
    maps = [random_map(base, other, centred=True), None]
    shared = language_model(base.path, seed=1)
    return compose(base, other, shared, strengths=[1.0, -0.5], maps=maps), maps


def _ids(model, texts):
    return [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_each_token_is_scored_by_what_is_read_anew_before_it(mapped):
    model, maps = mapped
    options = [GenerationOptions(), GenerationOptions(strengths=(0.3, 2.0)), GenerationOptions()]
    prompts = model.prepare(PROMPTS, options)
    continuations = _ids(model, CONTINUATIONS)
    found = dict(score_continuations(model, prompts, continuations, batch_size=2))
    assert sorted(found) == [0, 1, 2]
    for index, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
        strengths = options[index].strengths or model.strengths
        for place, token in enumerate(ids):
            read = [*prompt.token_ids, *ids[:place]]
            logits = step_anew(model, maps, PROMPTS[index], read, strengths)
            expected = scipy.special.log_softmax(logits.astype(np.float64))[token]
            assert found[index].log_prob[place] == pytest.approx(expected, abs=2e-4)
            assert found[index].largest[place] == (logits.argmax() == token)


def test_in_one_vocabulary_it_equals_reading_rows_at_once(base):
    model = compose(base, language_model(base.path, seed=3), strengths=[0.7])
    prompts = model.prepare(PROMPTS)
    continuations = _ids(model, CONTINUATIONS)
    forced = dict(score_continuations(model, prompts, continuations))
    rows = [Row([*p.token_ids, *ids]) for p, ids in zip(prompts, continuations, strict=True)]
    for index, scores in score_rows(model, rows, batch_size=4):
        at_once = scores.tokens.log_prob[-len(continuations[index]) :]
        np.testing.assert_allclose(forced[index].log_prob, at_once, atol=2e-5)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], ValueError, "continuation 0 has no tokens"),
        ([5, 512], ValueError, r"token ids outside \[0, 512\): \[512\]"),
        ([300] * 600, PromptTooLongError, "more than the context of"),
        ([300] * 100, PromptTooLongError, "in its own vocabulary, more than its context of 40"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_computed(mapped, ids, error, message):
    model, _ = mapped
    with pytest.raises(error, match=message):
        next(score_continuations(model, model.prepare(["Once"]), [ids]))
