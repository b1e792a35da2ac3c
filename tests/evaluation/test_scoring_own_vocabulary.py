"""Scores across vocabularies condition on each re-tokenised prefix, as decoding does."""

import numpy as np
import pytest

from ivl_jax.assets import family_folder
from ivl_jax.composed.own_prefixes import plan_prefixes
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.scoring import Row, score_rows
from tests.decoding.anew import compose_beside, random_map, step_anew
from tests.decoding.tiny import language_model

TEXTS = ["Once upon a time, unbelievably", "naïve 水と火 🙂!", "def f(a):\n    return 12345"]


@pytest.fixture(scope="module")
def mixed(stories260k_dir):
    """A base with values of two other vocabularies, and one of its own."""
    base, shared = (language_model(family_folder("S"), seed=seed) for seed in (0, 1))
    values = [language_model(stories260k_dir, seed=2), language_model(family_folder("X"), seed=3)]
    maps = [random_map(base, values[0], centred=True), random_map(base, values[1], seed=1), None]
    return compose_beside(base, *values, shared, strengths=[1.0, -0.7, 0.3], maps=maps), maps


def expected(model, maps, prompt, token_ids, position):
    """Log-probabilities [V] of what follows token_ids[: position + 1]."""
    logits = step_anew(model, maps, prompt, list(token_ids[: position + 1]), model.strengths)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_every_position_is_conditioned_on_its_re_tokenised_prefix(mixed):
    model, maps = mixed
    rng = np.random.default_rng(0)
    noise = rng.integers(1, model.composition.base.vocab_size, 25).tolist()  # 0 is the end
    rows = [Row(ids, other_last=(7,)) for ids in (*map(model.encode, TEXTS), noise)]
    found = dict(score_rows(model, rows, batch_size=4, with_base=True))
    for index, row in enumerate(rows):
        scores = found[index]
        for position, target in enumerate(row.token_ids[1:]):
            log_probs = expected(model, maps, "", row.token_ids, position)
            np.testing.assert_allclose(
                scores.tokens.log_prob[position], log_probs[target], atol=2e-4
            )
            assert scores.tokens.largest[position] == (log_probs.argmax() == target)
        np.testing.assert_allclose(scores.choices.log_prob[1], log_probs[7], atol=2e-4)
        assert np.isfinite(scores.base.divergence).all()


def test_with_a_prompt_the_value_reads_it_as_it_does_while_decoding(mixed):
    model, maps = mixed
    dialogues = [[Message("user", text)] for text in ("Hi", "Why 水?", "One")]
    prompts = model.prepare(dialogues)
    answers = [model.base.tokenizer(f" {text}")["input_ids"] for text in TEXTS]
    rows = [
        Row([*prompt.token_ids, *answer[:12]], prompt=prompt)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for index, scores in score_rows(model, rows, batch_size=4):
        row, start = rows[index], len(prompts[index].token_ids) - 1
        assert np.isnan(scores.tokens.log_prob[:start]).all()
        for position in range(start, len(row.token_ids) - 1):
            log_probs = expected(model, maps, dialogues[index], row.token_ids, position)
            target = row.token_ids[position + 1]
            np.testing.assert_allclose(
                scores.tokens.log_prob[position], log_probs[target], atol=2e-4
            )


def test_each_token_is_read_about_once(mixed, gsm8k_dir):
    model, _ = mixed
    text = (gsm8k_dir / "test.jsonl").read_text().splitlines()[0][:600]
    ids = model.encode(text)
    for own in filter(None, model.own_vocabularies):
        beginning = own.retokenizer.begin(ids[:1])
        reading = plan_prefixes([beginning], [ids[1:]], starts=[0], batch=1, length=len(ids))
        whole = beginning.fork()
        whole.push(ids[1:])
        assert reading.tokens[0, : len(whole.tokens)].tolist() == whole.tokens
        assert len(reading.tails) * reading.tails.shape[1] < 1.5 * len(whole.tokens)


def test_a_row_beyond_the_values_own_context_is_refused_by_name(stories260k_dir):
    base = language_model(family_folder("S"), seed=0)
    value = language_model(stories260k_dir, seed=2, context=16)
    model = compose(base, value, maps=[random_map(base, value)])
    rows = [Row(model.encode("word " * count)) for count in (2, 20)]
    with pytest.raises(ValueError, match=r"row 1: .* more than the context of 16 tokens of value"):
        list(score_rows(model, rows, batch_size=4))
