"""A composed model's next-byte distributions equal sums over its own next-token distributions."""

import jax
import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.byte_model import ByteReader
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.vocabulary.byte_paths import END, byte_nll
from tests.decoding.anew import compose_beside, last_logits, random_map
from tests.decoding.tiny import language_model


@pytest.fixture(scope="module")
def model():
    base, value = (language_model(family_folder("S"), seed=seed, width=16) for seed in (0, 1))
    return compose_beside(base, value, strengths=[0.5])


def test_the_first_byte_equals_the_sum_over_tokens_that_begin_with_it(model) -> None:
    prompt = model.encode("The mat")
    found = np.exp(ByteReader(model).begin(prompt).log_probs())
    logits = last_logits(model.base, prompt) + 0.5 * last_logits(model.values[0], prompt)
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    expected = np.zeros(257)
    for token_id, spelled in enumerate(model.token_bytes):
        if token_id in model.stop_ids:
            expected[END] += probs[token_id]
        elif spelled:
            expected[spelled[0]] += probs[token_id]
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


def test_a_text_is_at_least_as_likely_as_its_own_tokens(model) -> None:
    prompt, text = model.encode("The mat"), " is on"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ((_, scores),) = score_rows(model, [Row([*prompt, *ids])], batch_size=1)
    of_tokens = -float(scores.tokens.log_prob[-len(ids) :].sum())
    pruned, full = (
        byte_nll(ByteReader(model).begin(prompt, prune=prune), text.encode(), ends=False)
        for prune in (0.05, 0.0)
    )
    # Byte by byte, what follows the last token is open too.
    assert full < of_tokens
    assert full == pytest.approx(pruned, rel=0.2)


def test_a_model_with_a_map_or_a_text_beyond_the_context_is_refused(model) -> None:
    base, value = model.base, language_model(family_folder("X"), seed=2, width=16)
    mapped = compose(base, value, maps=[random_map(base, value)])
    with pytest.raises(ValueError, match="need networks of one vocabulary"):
        ByteReader(mapped)
    with pytest.raises(ValueError, match=rf"context of {model.context} tokens"):
        ByteReader(model).begin([1] * (model.context + 1))
