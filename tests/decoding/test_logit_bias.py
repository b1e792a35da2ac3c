"""A logit bias changes the tokens of its own request and nothing else."""

import numpy as np

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from tests.decoding.anew import random_map
from tests.decoding.tiny import NEAR_TIE, language_model, plain_logits

PROMPTS = ["Once upon a time", "", "The big dog", "Lily said"]


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_tokens_are_those_of_biased_logits_and_log_probabilities_those_of_the_models(recorded):
    model, calls = recorded
    plain = model.generate(PROMPTS, max_new_tokens=12)
    banned = set(plain[0].token_ids[:3])
    biases = [
        dict.fromkeys(banned, -100),
        {},
        {300: 100},
        {token: 0.5 * (token % 13) for token in range(260, 400)},
    ]
    each = [
        GenerationOptions(max_new_tokens=18 - 2 * row, log_probs=0, logit_bias=bias)
        for row, bias in enumerate(biases)
    ]
    each[1] = GenerationOptions(max_new_tokens=40)
    calls.clear()
    together = model.generate(PROMPTS, each)
    assert together[1].token_ids[:12] == plain[1].token_ids
    assert not banned & set(together[0].token_ids)
    assert set(together[2].token_ids) == {300}
    assert together[3].token_ids != plain[3].token_ids
    for row in (0, 2, 3):
        ids, tokens = model.encode(PROMPTS[row]), list(together[row].token_ids)
        logits = plain_logits(model.composition, model.params, [*ids, *tokens], model.strengths)
        logits = logits[len(ids) - 1 : -1, :512]
        biased = logits.copy()
        biased[:, list(biases[row])] += np.float32(list(biases[row].values()))
        chosen = np.take_along_axis(biased, np.asarray(tokens)[:, None], axis=1)[:, 0]
        assert (biased.max(axis=1) - chosen < NEAR_TIE).all()
        expected = log_softmax(logits)[np.arange(len(tokens)), tokens]
        found = [one.log_prob for one in together[row].log_probs]
        np.testing.assert_allclose(found, expected, atol=1e-3)
    # Once the rows with a bias have ended, the other one runs the programs of before.
    states = [given[1] for name, given, _ in calls if name == "decode_chunk"]
    has_bias = [state.requests.sampling.bias is not None for state in states]
    assert has_bias == sorted(has_bias, reverse=True)
    assert set(has_bias) == {True, False}


def test_a_bias_counts_under_value_networks_of_other_vocabularies_and_n_grams(stories260k_dir):
    base = language_model(stories260k_dir, seed=0)
    value = language_model(family_folder("S"), seed=2)
    maps = [random_map(base, value)]
    model = compose(base, value, strengths=0.5, maps=maps, draft="ngram", draft_length=3)
    found = model.generate(PROMPTS[0], max_new_tokens=16, logit_bias={300: 100})
    assert found.token_ids == (300,) * 16
    # Single steps until the text repeats itself, then blocks.
    assert 0 < found.accepted_tokens < 15
