"""Strength policies: what each one computes, and that the rows of no policy keep every bit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.composed import strength_policies
from ivl_jax.composed.forward import NetworkLogits, compose
from ivl_jax.composed.network import Composition, Network, ValueArrays
from ivl_jax.composed.strength_policies import (
    STRENGTH_POLICIES,
    PolicyInputs,
    PolicyRows,
    check_policy,
    rows_of,
    strength_shares,
)
from ivl_jax.config import FULL_STRENGTH, ComposedModelConfig, ConfigError, StrengthPolicy
from ivl_jax.config.model import model_problems
from ivl_jax.decoding.loading import read_sources
from ivl_jax.model.network import build_network
from tests.decoding.tiny import policy_share, tiny_arch

ROWS, LENGTH, VOCAB, PADDED = 4, 3, 11, 13


def random_logits(seed, width=PADDED, size=3.0):
    rng = np.random.default_rng(seed)
    return (size * rng.standard_normal((ROWS, LENGTH, width))).astype(np.float32)


def masked(logits):
    return np.where(np.arange(PADDED) < VOCAB, logits, -np.inf).astype(np.float32)


def share(name, base, composed, scale):
    inputs = PolicyInputs(jnp.asarray(base), jnp.asarray(composed), jnp.full((1, 1), scale))
    return np.asarray(STRENGTH_POLICIES[name](inputs))


def tiny_composed(value_vocab=9):
    """A composition of two value networks, without arrays: only its heads' logits are composed."""
    arch = tiny_arch(rows=PADDED)
    network = Network(build_network(arch), arch, VOCAB)
    values = (dataclasses.replace(network, vocab_size=value_vocab), network)
    unknown = jnp.asarray([4], jnp.int32)
    return Composition(network, values), (ValueArrays({}, unknown), ValueArrays({}))


def composed_by(policies, strengths):
    composition, arrays = tiny_composed()
    values = (jnp.asarray(random_logits(2)), jnp.asarray(random_logits(3)))
    logits = NetworkLogits(jnp.asarray(random_logits(1)), values)
    alphas = jnp.asarray(strengths, jnp.float32)
    return np.asarray(compose(composition, arrays, logits, strengths=alphas, policies=policies))


@pytest.mark.parametrize("name", ["entropy", "kl"])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_policy_is_its_formula(name, scale):
    base, composed = masked(random_logits(0)), masked(random_logits(1))
    expected = policy_share(StrengthPolicy(name, scale), base, composed)
    np.testing.assert_allclose(share(name, base, composed, scale), expected, rtol=2e-5)


SURE = masked(np.zeros((ROWS, LENGTH, PADDED))) + 200 * (np.arange(PADDED) == 5)
OPEN = masked(np.zeros((ROWS, LENGTH, PADDED)))


@pytest.mark.parametrize(
    ("name", "base", "composed", "scale", "expected"),
    [
        ("constant", OPEN, SURE, 1.0, 1.0),
        ("entropy", SURE, OPEN, 1.0, 0.0),  # a sure base is left alone
        ("entropy", OPEN, SURE, np.log(VOCAB), 0.5),  # padding columns carry no entropy
        ("entropy", OPEN, SURE, 1e-6, 1.0),
        ("entropy", OPEN, SURE, 1e6, 0.0),
        ("kl", OPEN, OPEN, 1e-6, 1.0),  # nothing changes: the full strength
        ("kl", SURE, OPEN, 1e-6, 0.0),
        ("kl", OPEN, SURE, np.log(VOCAB), 0.5),
        ("kl", OPEN, SURE, 1e6, 1.0),
    ],
)
def test_the_limits_of_each_policy(name, base, composed, scale, expected):
    np.testing.assert_allclose(share(name, base, composed, scale), expected, atol=5e-6)


def test_each_row_follows_its_own_policy_and_the_others_keep_every_bit():
    strengths = [[0.7, -0.4]] * ROWS
    kinds = [FULL_STRENGTH, StrengthPolicy("entropy", 0.5), StrengthPolicy("kl", 2.0), None]
    policies = {
        kind.name: PolicyRows(jnp.arange(ROWS) == row, jnp.full(ROWS, kind.scale))
        for row, kind in enumerate(kinds)
        if kind and not kind.is_constant
    }
    constant = composed_by(None, strengths)
    found = composed_by(policies, strengths)
    np.testing.assert_array_equal(found[[0, 3]], constant[[0, 3]])
    base = composed_by(None, [[0.0, 0.0]] * ROWS)
    for row in (1, 2):
        part = policy_share(kinds[row], base[row], constant[row])[:, None]
        before, full, own = (each[row, :, :VOCAB] for each in (base, constant, found))
        np.testing.assert_allclose(own, before + part * (full - before), atol=1e-5)
        assert np.abs(own - full).max() > 0.1
    assert np.isneginf(found[:, :, VOCAB:]).all()


def test_constant_strengths_compute_nothing_for_policies_and_their_table_entry_changes_no_bit():
    assert rows_of(FULL_STRENGTH) == {}
    constant = composed_by(None, [[0.7, -0.4]])
    rows = {"constant": PolicyRows(jnp.ones(1, bool), jnp.ones(1))}
    np.testing.assert_array_equal(composed_by(rows, [[0.7, -0.4]]), constant)
    np.testing.assert_array_equal(composed_by({}, [[0.7, -0.4]]), constant)


def test_a_policy_of_your_own_is_one_entry_of_the_table(monkeypatch):
    def scaled_where_an_even_token_is_likeliest(inputs):
        return jnp.where(jnp.argmax(inputs.base, axis=-1) % 2 == 0, inputs.scale, 1.0)

    mine = scaled_where_an_even_token_is_likeliest
    monkeypatch.setitem(strength_policies.STRENGTH_POLICIES, "mine", mine)
    policy = StrengthPolicy("mine", 0.5)
    check_policy(policy, where="here")
    base = jnp.asarray(masked(random_logits(1)))
    found = np.asarray(strength_shares(rows_of(policy), base, base))
    even = np.asarray(base).argmax(-1) % 2 == 0
    assert even.any()
    np.testing.assert_array_equal(found, np.where(even, 0.5, 1.0).astype(np.float32))
    whole, mapped = (composed_by(rows, [[1.0, 1.0]]) for rows in (None, rows_of(policy)))
    assert (whole != mapped).any(axis=-1).tolist() == even.tolist()


def test_a_policy_that_does_not_exist_is_refused_before_any_folder_is_looked_for():
    config = ComposedModelConfig(base="absent", value=("absent",), strength_policy="entrpy")
    with pytest.raises(ValueError, match="--strength-policy: expected one of constant, entropy, k"):
        read_sources(config)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e7, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(ConfigError, match="the scale must be between 1e-06 and 1e\\+06 nats, got"):
        StrengthPolicy("kl", scale)
    with pytest.raises(ConfigError, match="--policy-scale must be"):
        ComposedModelConfig(policy_scale=scale)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"policy_scale": 2.0}, "--policy-scale 2 needs --strength-policy entropy or kl"),
        (
            {"value": ("none",), "strength_policy": "kl"},
            "--value none (the base alone) cannot be combined with --strength-policy kl",
        ),
    ],
)
def test_flags_of_a_policy_that_would_change_nothing_are_refused(flags, problem):
    (found,) = model_problems(ComposedModelConfig(**{"base": "B", "value": ("V",), **flags}))
    assert found.startswith(problem)
