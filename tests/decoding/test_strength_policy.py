"""Strength policies in decoding: the tokens of a plain implementation, row by row."""

import dataclasses

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import FULL_STRENGTH, ComposedModelConfig, StrengthPolicy
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.loading import load_composed, read_sources
from ivl_jax.decoding.requests import GenerationOptions
from tests.decoding.anew import random_map
from tests.decoding.tiny import NEAR_TIE, language_model, policy_logits

PROMPTS = ["Once upon a time", "", "The big dog", "Lily said"]
POLICIES = [StrengthPolicy("entropy", 4.0), None, StrengthPolicy("kl", 0.2), FULL_STRENGTH]


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_each_row_has_the_tokens_and_log_probabilities_of_its_own_policy(recorded):
    model, calls = recorded
    strong = dataclasses.replace(model, strengths=(3.0,))
    plain = strong.generate(PROMPTS, max_new_tokens=12)
    each = [
        GenerationOptions(max_new_tokens=12 + 12 * (row == 1), log_probs=0, policy=policy)
        for row, policy in enumerate(POLICIES)
    ]
    calls.clear()
    together = strong.generate(PROMPTS, each)
    for row, policy in enumerate(POLICIES):
        ids, tokens = strong.encode(PROMPTS[row]), list(together[row].token_ids)
        changed = policy if policy and policy.name != "constant" else None
        assert (together[row].token_ids[:12] == plain[row].token_ids) == (changed is None)
        logits = policy_logits(
            model.composition, model.params, [*ids, *tokens], strong.strengths, changed
        )
        logits = logits[len(ids) - 1 : -1, :512]
        chosen = logits[np.arange(len(tokens)), tokens]
        assert (logits.max(axis=1) - chosen < NEAR_TIE).all()
        found = [one.log_prob for one in together[row].log_probs]
        expected = log_softmax(logits)[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(found, expected, atol=1e-3)
    # Once the rows with a policy have ended, the other one runs the programs of before.
    states = [given[1] for name, given, _ in calls if name == "decode_chunk"]
    has_policy = [state.requests.policies is not None for state in states]
    assert has_policy == sorted(has_policy, reverse=True)
    assert set(has_policy) == {True, False}


def test_the_models_policy_applies_where_a_prompt_names_none(stories, value, composed):
    policy = StrengthPolicy("entropy", 4.0)
    model = compose(stories, value, strengths=3.0, policy=policy)
    own = dataclasses.replace(composed, strengths=(3.0,)).generate(
        PROMPTS[0], policy=policy, max_new_tokens=12
    )
    assert model.generate(PROMPTS[0], max_new_tokens=12).token_ids == own.token_ids
    full = model.generate(PROMPTS[0], policy=FULL_STRENGTH, max_new_tokens=12)
    assert full.token_ids != own.token_ids


def test_flags_give_a_model_its_policy(stories260k_dir):
    folder = str(stories260k_dir)
    flags = ComposedModelConfig(folder, (folder,), strength_policy="kl", policy_scale=2.0)
    model = load_composed(read_sources(flags), flags, mesh=None)
    assert model.policy == StrengthPolicy("kl", 2.0)


def test_a_policy_counts_under_value_networks_of_other_vocabularies_and_n_grams(stories260k_dir):
    base = language_model(stories260k_dir, seed=0)
    value = language_model(family_folder("S"), seed=2)
    maps = [random_map(base, value)]
    alone = compose(base).generate(PROMPTS[0], max_new_tokens=16)
    model = compose(base, value, strengths=2.0, maps=maps, draft="ngram", draft_length=3)
    assert model.generate(PROMPTS[0], max_new_tokens=16).token_ids != alone.token_ids
    # Nearly nothing of the strength is left where the divergence is so much larger than the scale.
    found = model.generate(PROMPTS[0], policy=StrengthPolicy("kl", 1e-6), max_new_tokens=16)
    assert found.token_ids == alone.token_ids


def test_a_policy_that_does_not_exist_is_named(composed, stories, value):
    with pytest.raises(ValueError, match="prompt 0: policy: expected one of constant, en"):
        composed.generate(["a"], policy=StrengthPolicy("entrpy"))
    with pytest.raises(ValueError, match="policy: expected one of constant, entropy, kl"):
        compose(stories, value, policy=StrengthPolicy("entrpy"))
