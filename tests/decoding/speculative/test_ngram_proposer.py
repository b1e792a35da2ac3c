"""N-grams of the text propose what followed them before, and change no token."""

import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.config import ComposedModelConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.decoding.speculative.ngram_proposer import find_repetition
from tests.decoding.conftest import make_value


def found_plainly(tokens):
    """The same in plain Python, one row."""
    last = len(tokens)
    for size in (4, 3, 2):
        ends = [
            place
            for place in range(size, last)
            if last >= size and tokens[place - size : place] == tokens[last - size : last]
        ]
        if ends:
            return max(ends)
    return 0


def test_repetitions_are_found_where_a_plain_search_finds_them():
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(0, 4, (40, 24), np.int32), rng.integers(1, 25, 40)
    found = find_repetition(jnp.asarray(rows), jnp.asarray(lengths, jnp.int32))
    expected = [found_plainly(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]
    assert found.tolist() == expected
    assert {0} < set(expected)


@pytest.mark.slow
def test_ngram_drafts_change_no_token_and_some_are_accepted(stories):
    value = make_value(stories)
    plain = compose(stories, value, strengths=[0.1])
    model = compose(stories, value, strengths=[0.1], draft="ngram", draft_length=3)
    again = "Lily had a red ball. Tom had a blue ball. Lily had a red ball. Tom had a"
    prompts, options = [again, "Once", ""], GenerationOptions(max_new_tokens=24)
    found = model.generate(prompts, options, batch_size=2)
    assert found == plain.generate(prompts, options)
    assert sum(one.accepted_tokens for one in found) > 0
    assert all(one.accepted_tokens <= one.proposed_tokens for one in found)
    # Nothing ends as a row of one token does.
    assert model.generate("", max_new_tokens=2).proposed_tokens == 0


def test_values_that_read_the_base_cannot_be_drafted_for(stories):
    cascade = make_value(stories, connection="cascade")
    with pytest.raises(ValueError, match="under n-grams as the draft differ from those under"):
        compose(stories, cascade, draft="ngram")


def test_the_flag_names_ngrams_or_a_model():
    flags = ComposedModelConfig(draft="ngram")
    assert (flags.drafts_ngrams, flags.draft_model) == (True, "")
    flags = ComposedModelConfig(draft="models/S")
    assert (flags.drafts_ngrams, flags.draft_model) == (False, "models/S")
