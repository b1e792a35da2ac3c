"""Next-byte distributions equal sums over every token sequence, listed one by one."""

import itertools

import numpy as np
import pytest

from ivl_jax.vocabulary.byte_paths import (
    END,
    BytePaths,
    ByteVocabulary,
    ComposedBytes,
    byte_nll,
    greedy_bytes,
)

FIRST = [b"", b"a", b"b", b"ab", b"aab", b"", b"ba", b"a"]  # 0 begins, 5 ends; a twice
SECOND = [b"b", b"", b"a", b"bb", b"aa", b"abb"]  # 1 ends
ENDS = {len(FIRST): 5, len(SECOND): 1}


def _model(size: int, seed: int, sharpness: float = 1.0):
    """Random log-probabilities that depend on the whole history."""

    def next_log_probs(histories):
        rows = [np.random.default_rng([seed, *ids]).normal(size=size) for ids in histories]
        logits = sharpness * np.array(rows)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    return next_log_probs


def _vocabulary(table) -> ByteVocabulary:
    return ByteVocabulary(table, [ENDS[len(table)]])


def _probability(model, table, ids) -> float:
    """p(ids) with special tokens other than the end excluded at each step."""
    allowed = [i for i, b in enumerate(table) if b or i == ENDS[len(table)]]
    total = 1.0
    for place, token_id in enumerate(ids):
        p = np.exp(model([tuple(ids[:place])])[0])
        total *= p[token_id] / p[allowed].sum()
    return total


def _covering(table, text: bytes):
    """Every token sequence that covers a text: its tokens but the last fall short of the text."""
    spoken = [i for i, b in enumerate(table) if b]
    for length in range(1, len(text) + 1):
        for ids in itertools.product(spoken, repeat=length):
            spelled = b"".join(table[i] for i in ids)
            before = len(spelled) - len(table[ids[-1]])
            if before < len(text) <= len(spelled) and spelled.startswith(text):
                yield ids


def _spelling(table, text: bytes):
    """Every token sequence that spells exactly a text."""
    if not text:
        return [()]
    return [ids for ids in _covering(table, text) if sum(len(table[i]) for i in ids) == len(text)]


@pytest.mark.parametrize("table", [FIRST, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("text", [b"", b"a", b"aab", b"abab", b"bbaa"])
def test_the_next_byte_equals_the_sum_over_all_token_sequences(table, text) -> None:
    model = _model(len(table), seed=1)
    paths = BytePaths(_vocabulary(table), model)
    for byte in text:
        paths.push(byte)
    expected = np.zeros(257)
    for byte in b"ab":
        ids = _covering(table, text + bytes([byte]))
        expected[byte] = sum(_probability(model, table, one) for one in ids)
    expected[END] = sum(
        _probability(model, table, (*ids, ENDS[len(table)])) for ids in _spelling(table, text)
    )
    # What follows the text in one way or another has the text's own probability.
    if text:
        whole = sum(_probability(model, table, ids) for ids in _covering(table, text))
        assert expected.sum() == pytest.approx(whole)
    np.testing.assert_allclose(np.exp(paths.log_probs()), expected / expected.sum(), atol=1e-12)
    assert paths.dropped == 0


def test_a_texts_likelihood_is_the_sum_over_its_spellings() -> None:
    model, text = _model(len(FIRST), seed=2), b"aaba"
    nll = byte_nll(BytePaths(_vocabulary(FIRST), model), text, ends=True)
    total = sum(_probability(model, FIRST, (*ids, 5)) for ids in _spelling(FIRST, text))
    assert len(_spelling(FIRST, text)) > 10
    assert nll == pytest.approx(-np.log(total))


def test_on_the_training_base_the_composition_is_the_tuned_model() -> None:
    def paths(seed: int) -> BytePaths:
        return BytePaths(_vocabulary(FIRST), _model(len(FIRST), seed))

    composed, tuned = ComposedBytes(paths(3), paths(4), paths(3)), paths(4)
    unchanged = ComposedBytes(paths(3), paths(4), paths(3), strength=0.0)
    plain = paths(3)
    for byte in b"abba":
        np.testing.assert_allclose(composed.log_probs(), tuned.log_probs(), atol=1e-12)
        np.testing.assert_allclose(unchanged.log_probs(), plain.log_probs(), atol=1e-12)
        for model in (composed, tuned, unchanged, plain):
            model.push(byte)


def test_a_change_crosses_vocabularies_byte_by_byte() -> None:
    base = BytePaths(_vocabulary(SECOND), _model(len(SECOND), 5))
    tuned, untuned = (BytePaths(_vocabulary(FIRST), _model(len(FIRST), seed)) for seed in (6, 7))
    each = [model.log_probs() for model in (base, tuned, untuned)]
    composed = np.exp(ComposedBytes(base, tuned, untuned, strength=0.5).log_probs())
    weights = np.exp([each[0][s] + 0.5 * (each[1][s] - each[2][s]) for s in (*b"ab", END)])
    np.testing.assert_allclose(composed[[*b"ab", END]], weights / weights.sum())
    assert composed.sum() == pytest.approx(1)


def test_pruning_keeps_few_sequences_and_bounds_what_it_drops() -> None:
    model, text = _model(len(FIRST), seed=8, sharpness=3.0), b"aabaabab"
    full, few = (BytePaths(_vocabulary(FIRST), model, prune=prune) for prune in (0.0, 1e-2))
    for byte in text:
        full.push(byte)
        few.push(byte)
    assert len(few) < len(full) / 3
    assert 0 < few.dropped < 0.2
    distance = np.abs(np.exp(few.log_probs()) - np.exp(full.log_probs())).sum()
    assert distance < 3 * few.dropped


def test_greedy_bytes_follow_the_largest_probability_up_to_the_end() -> None:
    def paths() -> BytePaths:
        return BytePaths(_vocabulary(FIRST), _model(len(FIRST), seed=9))

    text, again = greedy_bytes(paths(), limit=12), paths()
    for byte in text:
        assert int(np.argmax(again.log_probs())) == byte
        again.push(byte)
    assert len(text) == 12 or int(np.argmax(again.log_probs())) == END
    assert greedy_bytes(paths(), limit=1) == text[:1]


def test_a_byte_that_no_token_spells_is_an_error() -> None:
    paths = BytePaths(_vocabulary(FIRST), _model(len(FIRST), seed=1))
    with pytest.raises(ValueError, match="no tokens spell the text after byte 99"):
        paths.push(ord("c"))


@pytest.mark.parametrize("seed", range(4))
def test_however_much_is_dropped_any_text_can_follow(seed: int) -> None:
    paths = BytePaths(_vocabulary(FIRST), _model(len(FIRST), seed, sharpness=8.0), prune=0.4)
    for byte in np.random.default_rng(seed).choice(list(b"ab"), size=40):
        paths.push(int(byte))
    assert np.isfinite(paths.log_probs()[list(b"ab")]).all()
