"""The composition is the sum it claims to be, in float32, masked once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composition import compose_logits, value_penalty
from ivl_jax.vocabulary.mapping import VocabularyMap
from ivl_jax.vocabulary.value_term import ValueTerm

B, T, V = 2, 3, 8


def _logits(seed: int, width: int = V) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, T, width))


def _ones() -> jax.Array:
    return jnp.ones((1,))


def test_zero_value_network_leaves_base_logits_unchanged() -> None:
    base = _logits(0)
    zero = ValueTerm(jnp.zeros((B, T, V)), _ones(), V)
    np.testing.assert_array_equal(compose_logits(base, [zero], vocab_size=V), base)
    nothing = ValueTerm(_logits(1).at[0, 0, 0].set(jnp.nan), jnp.zeros((1,)), V)
    np.testing.assert_array_equal(compose_logits(base, [nothing], vocab_size=V), base)
    np.testing.assert_array_equal(compose_logits(base, [], vocab_size=V), base)


def test_composition_is_the_weighted_sum_of_all_terms() -> None:
    base, first, second = _logits(0), _logits(1), _logits(2)
    strengths = jnp.array([0.5, -2.0])
    terms = [ValueTerm(first, strengths, V), ValueTerm(second, jnp.array([3.0]), V)]
    expected = np.asarray(base) + np.asarray(strengths)[:, None, None] * first + 3.0 * second
    np.testing.assert_allclose(compose_logits(base, terms, vocab_size=V), expected, rtol=1e-6)


def test_padded_columns_are_minus_infinity_even_with_negative_strength() -> None:
    padded = _logits(0).at[..., 6:].set(-jnp.inf)
    term = ValueTerm(padded, jnp.array([-1.0]), 6)
    composed = np.asarray(compose_logits(padded, [term], vocab_size=6))
    assert np.isneginf(composed[..., 6:]).all()
    assert np.isfinite(composed[..., :6]).all()


@pytest.mark.parametrize("width", [5, 8, 12])
def test_widths_may_differ_and_unknown_tokens_get_value_logit_zero(width: int) -> None:
    base, value = _logits(0), _logits(1, width)
    known = min(width, 7)
    term = ValueTerm(value, _ones(), known, unknown_ids=jnp.array([2]))
    composed = np.asarray(compose_logits(base, [term], vocab_size=V))
    difference = composed - np.asarray(base)
    expected = np.zeros((B, T, V), np.float32)
    expected[..., :known] = np.asarray(value)[..., :known]
    expected[..., 2] = 0
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_a_mapped_term_adds_weighted_columns_of_its_own_vocabulary_and_nothing_elsewhere() -> None:
    base, value = _logits(0), _logits(1, 5).at[..., 4].set(jnp.nan)  # the last column is padding
    index, weight = np.array([3, 0, 1, 0, 3, 2]), np.array([1.0, 0.0, 0.5, 1.0, 0.25, 0.0])
    vocabulary_map = VocabularyMap(jnp.asarray(index, jnp.int32), jnp.asarray(weight, jnp.float32))
    plain = ValueTerm(_logits(2), _ones(), V)
    for centred in (False, True):
        term = ValueTerm(value, jnp.array([-2.0]), 4, None, vocabulary_map, centred)
        composed = np.asarray(compose_logits(base, [plain, term], vocab_size=7))
        z = np.asarray(value)
        if centred:
            z = z - z[..., [0, 1, 3]].mean(-1, keepdims=True)
        expected = np.array(base + _logits(2))
        expected[..., :6] += -2.0 * np.where(weight != 0, weight * z[..., index], 0.0)
        np.testing.assert_allclose(composed[..., :7], expected[..., :7], rtol=1e-5, atol=1e-6)
        assert np.isneginf(composed[..., 7]).all()


def test_a_projected_term_adds_weighted_sums_of_columns() -> None:
    base, value = _logits(0), _logits(1, 5)
    index = np.array([[3, 1], [0, 0], [1, 2], [0, 3], [3, 0], [2, 0]])
    weight = np.array([[0.5, 0.5], [0, 0], [0.25, 0.75], [0.9, 0.1], [1, 0], [1, 0]])
    vocabulary_map = VocabularyMap(jnp.asarray(index, jnp.int32), jnp.asarray(weight, jnp.float32))
    term = ValueTerm(value, jnp.array([-2.0]), 4, None, vocabulary_map)
    composed = np.asarray(compose_logits(base, [term], vocab_size=7))
    expected = np.array(base)
    expected[..., :6] += -2.0 * (weight * np.asarray(value)[..., index]).sum(axis=-1)
    np.testing.assert_allclose(composed[..., :7], expected[..., :7], rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_composed_in_float32() -> None:
    base, value = _logits(0).astype(jnp.bfloat16), (_logits(1) * 1e-3).astype(jnp.bfloat16)
    composed = compose_logits(base, [ValueTerm(value, _ones(), V)], vocab_size=V)
    assert composed.dtype == jnp.float32
    expected = np.asarray(base, np.float32) + np.asarray(value, np.float32)
    np.testing.assert_array_equal(composed, expected)


def test_more_real_tokens_than_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 real tokens, but the base has only 8"):
        compose_logits(_logits(0), [], vocab_size=V + 1)
    term = ValueTerm(_logits(1, 4), _ones(), 5)
    with pytest.raises(ValueError, match="vocab_size = 5, but only 4 columns"):
        compose_logits(_logits(0), [term], vocab_size=V)


def test_penalty_counts_real_columns_and_marked_tokens_only() -> None:
    value = _logits(3).at[..., 6:].set(jnp.nan).at[0, 0].set(jnp.inf)
    mask = jnp.array([[False, True, True], [True, False, True]])
    real = np.asarray(value)[np.asarray(mask)][:, :6]
    total = jnp.sum(jnp.where(mask, value_penalty(value, kind="l1", vocab_size=6), 0.0))
    np.testing.assert_allclose(total, np.abs(real).mean(-1).sum(), rtol=1e-6)
    total = jnp.sum(jnp.where(mask, value_penalty(value, kind="l2", vocab_size=6), 0.0))
    np.testing.assert_allclose(total, (real**2).mean(-1).sum(), rtol=1e-6)
    assert not value_penalty(value, kind="none", vocab_size=6).any()


def test_penalty_gradient_is_zero_where_nothing_counts() -> None:
    mask = jnp.array([[False, True, True], [True, False, True]])

    def loss(value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, value_penalty(value, kind="l1", vocab_size=6), 0.0))

    gradient = np.asarray(jax.grad(loss)(_logits(4)))
    assert (gradient[..., 6:] == 0).all()
    assert (gradient[~np.asarray(mask)] == 0).all()
    assert (np.abs(gradient[np.asarray(mask)][:, :6]) > 0).all()
