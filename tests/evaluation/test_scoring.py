import dataclasses

import jax
import numpy as np
import pytest

from ivl_jax.config import StrengthPolicy
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation import scoring
from ivl_jax.evaluation.scoring import NonFiniteScoresError, Row, score_rows
from ivl_jax.sharding import make_mesh
from tests.decoding.tiny import VOCAB, plain_logits, policy_logits, tiny_composition

CONTEXT = 96


@pytest.fixture
def tiny_model(base_alone):
    """Makes composed models of one or two layers; the vocabulary has 40 real tokens of 44."""

    def make(*connections, strengths=(0.5, -0.3)):
        composition, params = tiny_composition(connections)
        return dataclasses.replace(
            base_alone,
            composition=composition,
            params=params,
            strengths=strengths[: len(connections)],
            prompts=dataclasses.replace(base_alone.prompts, context=CONTEXT),
        )

    return make


@pytest.fixture
def model(tiny_model):
    """A base with one residual value network."""
    return tiny_model("residual")


def random_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Row(rng.integers(0, VOCAB, size=length).tolist()) for length in lengths]


def scored(model, rows, **options):
    """Scores in the rows' order; fillers make every batch 4 × 16, so that little is compiled."""
    fillers = random_rows([2] * (-len(rows) % 4), seed=9)
    found = dict(score_rows(model, [*rows, *fillers], batch_size=4, **options))
    return [found[index] for index in range(len(rows))]


def expected_log_probs(model, token_ids):
    """[n − 1 V] log-probabilities, from the plain implementation of the decoding tests."""
    logits = plain_logits(model.composition, model.params, token_ids[:-1], model.strengths)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize("connections", [("residual",), ("cascade", "hidden")])
def test_scores_are_the_teacher_forced_log_probabilities(tiny_model, connections):
    model = tiny_model(*connections)
    rows = random_rows([16, 7, 2])
    for row, scores in zip(rows, scored(model, rows), strict=True):
        log_probs = expected_log_probs(model, row.token_ids)
        targets = np.asarray(row.token_ids[1:])
        np.testing.assert_allclose(
            scores.tokens.log_prob, log_probs[np.arange(len(targets)), targets], atol=1e-4
        )
        assert scores.tokens.largest.tolist() == (log_probs.argmax(-1) == targets).tolist()
        assert scores.base is None


def test_the_comparison_with_the_base_is_what_its_definition_says(model):
    base_alone = dataclasses.replace(model, strengths=(0.0,))
    (row,) = random_rows([16])
    (scores,) = scored(model, [row], with_base=True)
    both = expected_log_probs(model, row.token_ids)
    base = expected_log_probs(base_alone, row.token_ids)
    targets = np.asarray(row.token_ids[1:])
    np.testing.assert_allclose(
        scores.base.log_prob, base[np.arange(len(targets)), targets], atol=1e-4
    )
    assert scores.base.largest.tolist() == (base.argmax(-1) == targets).tolist()
    both, base = both[:, :VOCAB], base[:, :VOCAB]
    expected = np.sum(np.exp(both) * (both - base), axis=-1)
    np.testing.assert_allclose(scores.base.divergence, expected, atol=1e-3)
    assert (scores.base.magnitude > 0).all()
    np.testing.assert_allclose(
        scores.base.entropy, -np.sum(np.exp(base) * base, axis=-1), atol=1e-3
    )


def test_strength_zero_is_the_base(model):
    (row,) = random_rows([16])
    silent = dataclasses.replace(model, strengths=(0.0,))
    (scores,) = scored(silent, [row], with_base=True)
    np.testing.assert_array_equal(scores.tokens.log_prob, scores.base.log_prob)
    np.testing.assert_allclose(scores.base.divergence, 0.0, atol=1e-6)


@pytest.mark.parametrize("policy", [StrengthPolicy("entropy", 1.0), StrengthPolicy("kl", 0.5)])
def test_scores_under_a_strength_policy_are_those_of_its_definition(model, policy):
    (row,) = random_rows([16])
    (scores,) = scored(dataclasses.replace(model, policy=policy), [row], with_base=True)
    inputs, targets = row.token_ids[:-1], np.asarray(row.token_ids[1:])
    logits = policy_logits(model.composition, model.params, inputs, model.strengths, policy)
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, :VOCAB], axis=-1))
    expected = log_probs[np.arange(len(targets)), targets]
    np.testing.assert_allclose(scores.tokens.log_prob, expected, atol=1e-4)
    np.testing.assert_allclose(scores.choices.log_prob, expected[-1:], atol=1e-4)
    (constant,) = scored(model, [row], with_base=True)
    assert np.abs(constant.tokens.log_prob - expected).max() > 0.1
    np.testing.assert_array_equal(scores.base.log_prob, constant.base.log_prob)


def test_other_last_tokens_score_as_rows_of_their_own(model):
    (row,) = random_rows([12])
    candidates = [5, 39, 27]
    (together,) = scored(model, [row._replace(other_last=candidates)])
    alone = [Row([*row.token_ids[:-1], last]) for last in (row.token_ids[-1], *candidates)]
    each = scored(model, alone)
    np.testing.assert_allclose(
        together.choices.log_prob, [one.tokens.log_prob[-1] for one in each], atol=1e-4
    )
    assert together.choices.largest.tolist() == [bool(one.tokens.largest[-1]) for one in each]


def test_rows_in_a_batch_score_as_each_alone(model):
    rows = random_rows([9, 16, 2, 17, 13, 16])
    for row, scores in zip(rows, scored(model, rows), strict=True):
        (alone,) = scored(model, [row])
        np.testing.assert_allclose(scores.tokens.log_prob, alone.tokens.log_prob, atol=1e-4)


def test_a_head_run_in_parts_gives_the_scores_of_the_whole(model, monkeypatch):
    rows = random_rows([16, 11])
    whole = scored(model, rows, with_base=True)
    # 2 rows × 44 logits a position: 5 positions at once, which do not divide 16.
    monkeypatch.setitem(scoring._MAX_LOGITS, "cpu", 5 * 2 * 44)
    parts = scored(model, rows, with_base=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, parts)


def test_rows_of_other_lengths_in_the_bucket_compile_nothing(model):
    scored(model, random_rows([15, 17, 2, 4]))
    program = scoring._program(model.composition)
    compiled = program._cache_size()
    scored(model, random_rows([16, 3, 9, 8, 5], seed=1))
    assert program._cache_size() == compiled
    (scores,) = scored(model, random_rows([CONTEXT + 1]))  # the last token is only predicted
    assert scores.tokens.log_prob.shape == (CONTEXT,)
    assert program._cache_size() == compiled + 1, "the counter counts"


@pytest.mark.parametrize(
    ("token_ids", "said"),
    [
        ([4], "at least 2 tokens"),
        ([4] * (CONTEXT + 3), "2 more than the context of 96 tokens"),
        ([4, VOCAB], r"outside \[0, 40\): \[40\]"),
    ],
)
def test_impossible_rows_are_named_before_anything_is_computed(model, monkeypatch, token_ids, said):
    def fail(*_):
        pytest.fail("something was computed")

    monkeypatch.setattr(scoring, "_program", fail)
    with pytest.raises(ValueError, match=rf"row 1: .*{said}"):
        list(score_rows(model, [Row([4, 5]), Row(token_ids)], batch_size=4))


def test_a_mesh_gives_the_scores_of_one_device(stories, value, composed):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = compose(stories, value, strengths=[0.3], mesh=mesh)
    rows = [Row([1, *range(5, 5 + length)]) for length in (15, 9, 4)]  # 3 rows on 4 ways
    alone, found = (scored(model, rows, with_base=True) for model in (composed, spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), alone, found)


def test_a_row_whose_logits_are_not_finite_is_named_and_counts_for_nothing(model):
    # The value network reads tokens below 37, but 7.
    token, other = 5, 6
    rows = [Row([other] * 16), Row([other, token, other, other]), Row([other] * 2)]
    (value,) = model.params.values
    embedding = value.params["embed_tokens"]["embedding"].at[token].set(np.nan)
    broken = {**value.params, "embed_tokens": {"embedding": embedding}}
    params = model.params._replace(values=(value._replace(params=broken),))
    with pytest.raises(NonFiniteScoresError, match=r"row 1: log-probabilities that are not finite"):
        scored(dataclasses.replace(model, params=params), rows)
    assert len(scored(model, rows)) == 3
