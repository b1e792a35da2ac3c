"""Drafts beside value networks with their own vocabularies: the text is that of plain decoding."""

import dataclasses

import jax
import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.config import StrengthPolicy
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.decoding.speculative import rounds
from ivl_jax.decoding.speculative.draft_length import round_costs
from ivl_jax.decoding.speculative.draft_proposer import DRAFT_PROPOSER
from ivl_jax.model.network import init_network
from ivl_jax.tokenizer import describe_tokenizer
from ivl_jax.weights.language_model import LanguageModel, load_language_model
from tests.decoding.anew import compose_beside, random_map, step_anew
from tests.decoding.speculative.test_acceptance import assert_drawn_from
from tests.decoding.speculative.test_rounds import eager
from tests.decoding.test_own_vocabulary import toy_tokenizer
from tests.decoding.tiny import language_model, tiny_arch

REPEATING = ["a = b + c\nd = b + c\na = b + c\nd =", "naïve 水 naïve 水 naïve 水 na", "x"]
PROMPTS = ["def add(a, b):\n    return", "", "naïve 水", "import os\n", "class A:"]


@pytest.mark.parametrize("draft_length", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_n_grams_under_maps_write_the_text_of_plain_decoding(draft_length):
    base, value = (load_language_model(family_folder(name)) for name in "SX")
    maps = random_map(base, value)
    options = GenerationOptions(max_new_tokens=48)
    alone = compose(base, value, strengths=0.05, maps=maps).generate(REPEATING, options)
    drafted = compose(
        base, value, strengths=0.05, maps=maps, draft="ngram", draft_length=draft_length
    )
    ours = drafted.generate(REPEATING, options)
    assert [one.token_ids for one in ours] == [one.token_ids for one in alone]
    assert sum(one.accepted_tokens for one in ours) > 10


@pytest.mark.parametrize("draft_length", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_model_under_maps_drafts_the_text_of_plain_decoding(draft_length, monkeypatch):
    """Values with a map and without, together and alone, in rows that are refilled."""
    monkeypatch.setattr(rounds, "round_costs", eager)
    base, mapped = (load_language_model(family_folder(name)) for name in "SX")
    values = mapped, language_model(family_folder("S"), seed=1)
    composed = {"strengths": [0.05, 0.1], "maps": [random_map(base, mapped), None]}
    strengths = [None, (0.1, 0.0), None, (0.0, 0.1), (-0.05, 0.05)]
    options = [
        GenerationOptions(max_new_tokens=24 - 4 * row, strengths=one)
        for row, one in enumerate(strengths)
    ]
    alone = compose(base, *values, **composed).generate(PROMPTS, options)
    drafted = compose(base, *values, **composed, draft=base, draft_length=draft_length)
    ours = drafted.generate(PROMPTS, options, batch_size=3)
    assert [one.token_ids for one in ours] == [one.token_ids for one in alone]
    assert [one.text for one in ours] == [one.text for one in alone]
    proposed, accepted = (
        [getattr(one, kind) for one in ours] for kind in ("proposed_tokens", "accepted_tokens")
    )
    assert min(accepted) > 0
    assert sum(accepted) < sum(proposed)


def test_texts_drafted_under_maps_have_the_probability_that_the_composition_gives_them():
    base, mapped = (language_model(family_folder(name), seed=2) for name in "SX")
    values = mapped, language_model(family_folder("S"), seed=1)
    maps = [random_map(base, mapped), None]
    draft = language_model(family_folder("S"), seed=2, padding=5)
    model = compose_beside(
        base, *values, strengths=[0.15, 0.1], maps=maps, draft=draft, draft_length=2
    )
    options = GenerationOptions(max_new_tokens=4, temperature=8.0, top_k=2)
    drawn = model.generate(["Once"] * 1536, options, batch_size=1536)
    accepted = sum(one.accepted_tokens for one in drawn) / sum(one.proposed_tokens for one in drawn)
    assert 0.05 < accepted < 0.95
    texts = {(): 1.0}
    for _ in range(4):
        likelier = {}
        for text, share in texts.items():
            ids = [*model.encode("Once"), *text]
            logits = step_anew(model, maps, "Once", ids, model.strengths).astype(float)
            best = np.argsort(-logits)[:2]
            odds = np.exp((logits[best] - logits[best[0]]) / 8.0)
            for token, part in zip(best.tolist(), odds / odds.sum(), strict=True):
                likelier[*text, token] = share * part
        texts = likelier
    # A bin for what follows the first token, which comes with the prompt: 16 texts are too rare.
    index = {text: number for number, text in enumerate(texts)}
    bins = [index[one.token_ids] % 8 for one in drawn]
    assert_drawn_from(bins, np.asarray(list(texts.values())).reshape(2, 8).sum(axis=0))


def bytewise_model(*, seed):
    """A random model that reads bytes: no token is ever changed by those after it."""
    tokenizer = toy_tokenizer(bos_token="<s>", eos_token="</s>")
    info = describe_tokenizer(tokenizer)
    arch = tiny_arch(width=16, heads=2, kv_heads=1, layers=1, rows=info.vocab_size, context=192)
    params = jax.jit(lambda key: init_network(arch, key))(jax.random.key(seed))
    return LanguageModel("bytes", arch, params, tokenizer, info, info.eos_ids)


def test_a_draft_that_is_the_base_is_accepted_whole_under_a_map_that_adds_nothing():
    """It proposes under the value without a map, and by each row's bias, policy and sampling."""
    base, mapped = language_model(family_folder("S"), seed=0), bytewise_model(seed=3)
    described = random_map(base, mapped)
    nothing = described.vocabulary_map._replace(weight=0 * described.vocabulary_map.weight)
    model = compose(
        base,
        mapped,
        language_model(family_folder("S"), seed=1),
        strengths=[1.0, 0.8],
        maps=[described._replace(vocabulary_map=nothing), None],
        draft=base,
        draft_length=3,
    )
    # Single letters: as many bytes as tokens, which the caches of bytes have room for.
    letters = {
        token: 40.0
        for token in range(base.tokenizer_info.vocab_size)
        if len(model.token_bytes[token]) == 1 and model.token_bytes[token].isalpha()
    }
    plain = GenerationOptions(max_new_tokens=14, logit_bias=letters)
    each = [
        plain,
        dataclasses.replace(plain, temperature=1.5),
        dataclasses.replace(plain, logit_bias=dict.fromkeys(list(letters)[:2], 60.0)),
        dataclasses.replace(plain, policy=StrengthPolicy("entropy", 0.5)),
    ]
    found = model.generate(PROMPTS[:4], each)
    assert [len(one.token_ids) for one in found] == [14] * 4
    assert all(one.accepted_tokens == one.proposed_tokens >= 9 for one in found)


def test_only_values_without_a_map_cost_passes_while_a_draft_proposes():
    base, mapped = (language_model(family_folder(name), seed=0) for name in "SX")
    shared, described = language_model(family_folder("S"), seed=1), random_map(base, mapped)

    def of_proposing(*values, maps):
        model = compose(base, *values, maps=maps, draft=base)
        both = [
            round_costs(model.composition, model.params, proposer, batch=1)
            for proposer in (DRAFT_PROPOSER, dataclasses.replace(DRAFT_PROPOSER, runs_values=False))
        ]
        return both[0] - both[1]

    assert not of_proposing(mapped, maps=[described]).any()
    assert (np.diff(of_proposing(mapped, shared, maps=[described, None])) > 0).all()
