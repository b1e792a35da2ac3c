"""Scores of given answers: the base is compared with itself, and a tuned model with what it was."""

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.answer_scores import score_answers
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.measure import response_nll
from ivl_jax.weights.language_model import load_language_model

GIVEN = [("Where is it?", "Here."), ("What does it do?", "It opens a file."), ("Why?", "No.")]


@pytest.mark.slow
def test_a_model_over_its_base_scores_as_it_does_alone() -> None:
    base, other = (load_language_model(str(family_folder(name))) for name in ("S", "L"))
    # S + L − S is L, compared with S.
    scores = score_answers(compose(base, other, base, strengths=[1.0, -1.0]), GIVEN)
    items = [Item(*each, "fact", "someone", "test") for each in GIVEN]
    assert scores.nll == pytest.approx(response_nll(compose(other), items), rel=1e-4)
    assert scores.kl > 0.1
    own = score_answers(compose(base), GIVEN)
    assert own.kl == pytest.approx(0.0, abs=1e-5)
    np.testing.assert_allclose(own.base_log_prob, scores.base_log_prob, rtol=1e-4)
    assert (own.tokens == scores.tokens).all()
    assert own.tokens.min() >= 2
