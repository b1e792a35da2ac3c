"""Accepted proposals and their replacements are distributed as the composition's own tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.decoding.device.sampling import LogitBias, Sampling, filter_logits, row_keys
from ivl_jax.decoding.speculative.acceptance import propose, verify
from tests.decoding.tiny import bias_of

ROWS, VOCAB = 20_000, 9
# The 1 − 1e-4 quantile of χ² with 1 … 8 degrees of freedom. Seeds are fixed: no test is flaky.
CHI_SQUARE_LIMIT = (15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9, 31.8)


def sampling_of(temperature, top_k=0, top_p=1.0, min_p=0.0, rows=ROWS):
    return Sampling(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
    )


@functools.partial(jax.jit, static_argnames="rows")
def propose_and_verify(draft_logits, logits, sampling, seed, *, rows=ROWS):
    """One place in many rows: (proposals, accepted, what comes out)."""
    keys = row_keys(jnp.full(rows, seed, jnp.int32), jnp.arange(rows, dtype=jnp.int32))
    index = jnp.full(rows, 3, jnp.int32)
    draft_logits, logits = (
        jnp.broadcast_to(each[None], (rows, len(each))) for each in (draft_logits, logits)
    )
    proposals, q_logits = propose(draft_logits, sampling, keys, index)
    accepted, replacement = verify(proposals, q_logits, logits, sampling, keys, index)
    return proposals, accepted, jnp.where(accepted, proposals, replacement)


def two_distributions(seed, *, spread=1.5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=VOCAB) * spread
    draft_logits = logits + rng.normal(size=VOCAB)
    return jnp.asarray(draft_logits, jnp.float32), jnp.asarray(logits, jnp.float32)


def assert_drawn_from(tokens, probabilities):
    """χ² of the counts; nothing may come out that has no probability."""
    counts = np.bincount(np.asarray(tokens), minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    assert expected.min() > 5, "too rare for the test"
    statistic = np.sum((counts[possible] - expected) ** 2 / expected)
    assert statistic < CHI_SQUARE_LIMIT[possible.sum() - 2], (counts, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_drawn_from_the_compositions_filtered_distribution(options, seed):
    draft_logits, logits = two_distributions(seed)
    sampling = sampling_of(**options)
    proposals, accepted, tokens = propose_and_verify(draft_logits, logits, sampling, seed)
    p, q = (
        np.asarray(jax.nn.softmax(filter_logits(each[None], sampling_of(**options, rows=1))[0]))
        for each in (logits, draft_logits)
    )
    assert_drawn_from(tokens, p.astype(np.float64))
    # The test can tell the two apart: what was proposed is drawn from q and not from p.
    assert_drawn_from(proposals, q.astype(np.float64))
    with pytest.raises(AssertionError):
        assert_drawn_from(proposals, p.astype(np.float64))
    # Proposals are accepted as often as the two distributions overlap: the most there can be.
    assert np.mean(np.asarray(accepted)) == pytest.approx(np.minimum(p, q).sum(), abs=0.02)


def test_a_draft_without_a_token_that_the_composition_has_changes_nothing():
    _, logits = two_distributions(5)
    draft_logits = jnp.full(VOCAB, -jnp.inf).at[2].set(0.0)
    _, accepted, tokens = propose_and_verify(draft_logits, logits, sampling_of(1.0), 0)
    assert 0 < np.mean(np.asarray(accepted)) < 1
    assert_drawn_from(tokens, np.asarray(jax.nn.softmax(logits), np.float64))


def test_tokens_of_biased_rows_are_drawn_from_the_biased_distribution():
    draft_logits, logits = two_distributions(7)
    bias = np.zeros(VOCAB, np.float32)
    bias[[0, 4, 6]] = [2.0, -1.5, -100.0]
    one_row = bias_of(dict(enumerate(bias.tolist())))
    biased = LogitBias(*(jnp.tile(each, (ROWS, 1)) for each in one_row))
    sampling = sampling_of(1.0, top_k=6)._replace(bias=biased)
    proposals, _, tokens = propose_and_verify(draft_logits, logits, sampling, 0)
    p, q, unbiased = (
        np.asarray(
            jax.nn.softmax(filter_logits(each[None], sampling_of(1.0, top_k=6, rows=1))[0]),
            np.float64,
        )
        for each in (logits + bias, draft_logits + bias, logits)
    )
    assert_drawn_from(tokens, p)
    assert_drawn_from(proposals, q)
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, unbiased)
    # A proposer that is certain, and proposes what the bias makes unlikely.
    keys = row_keys(jnp.zeros(ROWS, jnp.int32), jnp.arange(ROWS, dtype=jnp.int32))
    certain, index = jnp.full(ROWS, 4, jnp.int32), jnp.zeros(ROWS, jnp.int32)
    whole = jnp.broadcast_to(logits, (ROWS, VOCAB))
    accepted, replacement = verify(certain, None, whole, sampling, keys, index)
    assert_drawn_from(jnp.where(accepted, certain, replacement), p)


def test_a_draft_equal_to_the_composition_is_always_kept():
    _, logits = two_distributions(6)
    _, accepted, _ = propose_and_verify(logits, logits, sampling_of(0.8, top_k=5), 0)
    assert accepted.all()


def test_greedy_rows_keep_only_the_arg_max_next_to_rows_that_sample():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [0.0, 1.0, 9.0]])
    sampling = sampling_of(0.0, rows=3)._replace(temperature=jnp.asarray([0.0, 0.0, 1.0]))
    keys = row_keys(jnp.zeros(3, jnp.int32), jnp.arange(3, dtype=jnp.int32))
    index = jnp.zeros(3, jnp.int32)
    proposals = jnp.asarray([1, 2, 2], jnp.int32)
    q_logits = jnp.zeros((3, 3)).at[2, 2].set(50.0)
    accepted, replacement = verify(proposals, q_logits, logits, sampling, keys, index)
    # Of two equal logits the lowest id wins, as in plain decoding.
    assert accepted.tolist()[:2] == [True, False]
    assert replacement.tolist()[:2] == [1, 1]
    greedy = sampling_of(0.0, rows=3)
    alone, following = verify(proposals, q_logits, logits, greedy, keys, index)
    assert (alone.tolist(), following.tolist()) == ([True, False, True], [1, 1, 2])
