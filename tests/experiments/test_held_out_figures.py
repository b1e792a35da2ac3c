"""Figures on held-out items: what is scored, and the sums that intervals are drawn from."""

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.experiments.answer_scores import ItemScores, answer_rows, score_given
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.held_out_figures import (
    answered,
    figures_on,
    group_sums,
    group_sums_from,
    nll_by_kind,
)
from ivl_jax.experiments.measure import response_nll
from ivl_jax.weights.language_model import load_language_model

ITEMS = [
    Item("Where does Dalor live?", "He lives in Quinmouth.", "fact", "Dalor", "test"),
    Item("What does zlib do?", "It compresses data.", "docstring", "zlib", "test"),
    Item("What does Dalor play?", "He plays the harp.", "fact", "Dalor", "test"),
]


def test_scores_are_of_the_tokens_that_training_learns() -> None:
    """The loss mask of training says independently which tokens are the answer's."""
    model = compose(load_language_model(str(family_folder("S"))))
    chat_format = make_chat_format(model.tokenizer)
    nats, tokens = [], []
    for item in ITEMS:
        whole = chat_format.encode_dialogue(
            (Message("user", item.question), Message("assistant", item.answer))
        )
        ((_, scores),) = score_rows(model, [Row(whole.tokens.tolist())], batch_size=1)
        learned = whole.loss_mask[1:]
        nats.append(-scores.tokens.log_prob[learned].sum(dtype=np.float64))
        tokens.append(int(learned.sum()))
    found = score_given(model, *answer_rows(model, [item.given for item in ITEMS]))
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert found.tokens.tolist() == tokens
    assert response_nll(model, ITEMS) == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)


def test_sums_are_by_person_and_module_and_give_the_same_means() -> None:
    scores = ItemScores(
        nats=np.asarray([4.0, 10.0, 2.0]),
        tokens=np.asarray([4, 5, 4]),
        likeliest=np.zeros(3, bool),
    )
    right = np.asarray([True, False, False])
    sums = group_sums_from(group_sums(ITEMS, scores, right).as_text())
    assert sums.nats.tolist() == [10.0, 6.0]  # the module, then the person
    assert sums.tokens.tolist() == [5.0, 8.0]
    assert sums.right.tolist() == [0.0, 1.0]
    assert sums.asked.tolist() == [0.0, 2.0]
    by_kind = nll_by_kind(ITEMS, scores)
    assert by_kind == {"nll": 16 / 13, "fact_nll": 6 / 8, "docstring_nll": 2.0}
    assert nll_by_kind(ITEMS[1:2], ItemScores(*(part[1:2] for part in scores))) == {
        "nll": 2.0,
        "fact_nll": None,
        "docstring_nll": 2.0,
    }


@pytest.mark.slow
def test_every_figure_of_a_base() -> None:
    model = compose(load_language_model(str(family_folder("S"))))
    right = answered(model, ITEMS)
    assert not right.any()  # a base answers no question
    found = figures_on(model, ITEMS, right)
    assert found["exact_match"] == 0.0
    assert 0.4 < found["recall"] < 0.55
    assert 3 < found["source_nll"] < 4
    assert len(found["groups"].split()) == 2
