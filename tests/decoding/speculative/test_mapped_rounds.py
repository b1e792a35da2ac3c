"""Drafts beside value networks with their own vocabularies: the text is that of plain decoding."""

import pytest

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.anew import random_map

REPEATING = ["a = b + c\nd = b + c\na = b + c\nd =", "naïve 水 naïve 水 naïve 水 na", "x"]


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
