"""The byte map equals its definition, byte by byte."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.token_bytes import ordinary_token_bytes
from ivl_jax.tokenizer import load_tokenizer
from ivl_jax.vocabulary.byte_offsets import (
    ByteCounts,
    TokenBytes,
    count_same_starts,
    project_same_starts,
    weigh_same_starts,
)
from ivl_jax.vocabulary.texts import read_texts


def plain_tokens(
    row: Sequence[int], table: TokenBytes, dropped: int
) -> dict[int, tuple[int, int, int]]:
    """Start byte → (id, end byte, own bytes); `dropped` bytes before the text do not count."""
    tokens, at = {}, -dropped
    for token in row:
        length = len(table[token] or b"")
        start, end = max(at, 0), at + length
        if end > start:
            tokens[start] = (token, end, length)
        at = end
    return tokens


def plain_scores(
    value_rows: Sequence[Sequence[int]],
    base_rows: Sequence[Sequence[int]],
    value_bytes: TokenBytes,
    base_bytes: TokenBytes,
) -> tuple[dict[int, dict[int, float]], dict[int, int]]:
    """By base token, each value token's sum of shares; and how often it was aligned."""
    score: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    met: dict[int, int] = defaultdict(int)
    for value_row, base_row in zip(value_rows, base_rows, strict=True):
        texts = [
            b"".join(table[t] or b"" for t in row)
            for row, table in ((value_row, value_bytes), (base_row, base_bytes))
        ]
        long, short = sorted(texts, key=len, reverse=True)
        if long not in (short, b" " + short):
            continue
        shortest = len(short)
        values = plain_tokens(value_row, value_bytes, len(texts[0]) - shortest)
        bases = plain_tokens(base_row, base_bytes, len(texts[1]) - shortest)
        for start, (base, base_end, base_length) in bases.items():
            if start in values:
                value, value_end, value_length = values[start]
                common = min(base_end, value_end) - start
                score[base][value] += common / max(base_length, value_length)
                met[base] += 1
    known = set(value_bytes)
    for base, spelled in enumerate(base_bytes):
        if spelled and spelled in known:
            # One of several base tokens with these bytes counts from the last.
            behind = sum(other == spelled for other in base_bytes[base + 1 :])
            same = [v for v, other in enumerate(value_bytes) if other == spelled]
            score[base][same[max(0, len(same) - 1 - behind)]] += 1
            met[base] += 1
    return score, met


def plain_map(
    value_rows: Sequence[Sequence[int]],
    base_rows: Sequence[Sequence[int]],
    value_bytes: TokenBytes,
    base_bytes: TokenBytes,
) -> tuple[np.ndarray, np.ndarray]:
    score, met = plain_scores(value_rows, base_rows, value_bytes, base_bytes)
    index, weight = np.zeros(len(base_bytes), int), np.zeros(len(base_bytes))
    for base, candidates in score.items():
        best = max(candidates.values())
        index[base] = min(value for value, amount in candidates.items() if amount == best)
        weight[base] = best / met[base]
    return index, weight


def _map(
    value_rows: Sequence[Sequence[int]],
    base_rows: Sequence[Sequence[int]],
    value_bytes: TokenBytes,
    base_bytes: TokenBytes,
) -> tuple[tuple[np.ndarray, np.ndarray], ByteCounts]:
    tables = {"value_bytes": value_bytes, "base_bytes": base_bytes}
    counts = count_same_starts(
        [np.array(row, np.int32) for row in value_rows],
        [np.array(row, np.int32) for row in base_rows],
        **tables,
    )
    return weigh_same_starts(counts, **tables), counts


def assert_same_map(
    got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)


def _greedy(text: bytes, table: TokenBytes) -> list[int]:
    """Longest match first: a tokenizer of its own kind for any table that has every byte."""
    row, at = [], 0
    while at < len(text):
        token = max(
            (t for t, spelled in enumerate(table) if spelled and text.startswith(spelled, at)),
            key=lambda t: (len(table[t] or b""), t),
        )
        row.append(token)
        at += len(table[token] or b"")
    return row


@settings(deadline=None)
@given(st.data())
def test_map_equals_its_definition_on_random_vocabularies(data: st.DataObject) -> None:
    pieces = st.lists(st.text("ab é", min_size=1, max_size=3), max_size=5)
    every_byte = [bytes([byte]) for byte in "ab é".encode()]
    tables: list[list[bytes | None]] = [
        [None, *every_byte, *(piece.encode() for piece in data.draw(pieces))] for _ in range(2)
    ]
    texts = data.draw(st.lists(st.text("ab é", min_size=1, max_size=12), min_size=1, max_size=4))
    # The base puts a space before each text and a special token before that, as Llama does.
    prefix = b" " if data.draw(st.booleans()) else b""
    value_rows = [_greedy(text.encode(), tables[0]) for text in texts]
    base_rows = [[0, *_greedy(prefix + text.encode(), tables[1])] for text in texts]
    for rows, others, table, other in (
        (value_rows, base_rows, tables[0], tables[1]),
        (base_rows, value_rows, tables[1], tables[0]),
    ):
        got, counts = _map(rows, others, table, other)
        assert counts.unequal == ()
        assert_same_map(got, plain_map(rows, others, table, other))
        tables_of = {"value_bytes": table, "base_bytes": other}
        index, weight = project_same_starts(counts, **tables_of, entries=2)
        score, _ = plain_scores(rows, others, table, other)
        for base in range(len(other)):
            best = sorted(score[base].items(), key=lambda pair: (-pair[1], pair[0]))[:2]
            total = sum(amount for _, amount in best)
            kept = {int(v): w for v, w in zip(index[base], weight[base], strict=True) if w}
            assert kept == pytest.approx({v: a / total for v, a in best})
            assert weight[base].sum() == pytest.approx(1.0 if best else 0.0)


def test_only_tokens_that_begin_at_the_same_byte_are_paired() -> None:
    #        Natalia sold        Nat|alia sold
    value = [None, b"Natalia", b" sold"]
    base = [None, b"Nat", b"alia", b" sold"]
    (index, weight), counts = _map([[1, 2]], [[1, 2, 3]], value, base)
    assert index.tolist() == [0, 1, 0, 2]
    np.testing.assert_allclose(weight, [0, 3 / 7, 0, 1])
    assert counts.aligned.tolist() == [0, 1, 0, 1]


def test_text_overrules_equal_bytes_and_equal_bytes_fill_what_no_text_shows() -> None:
    value = [b" ", b" 1", b"1", b"!", b"?"]
    base = [b" ", b"1", b"?", b"~"]
    # " 1" five times: the base's lone space begins where the value's " 1" begins.
    (index, weight), _ = _map([[1] * 5], [[0, 1] * 5], value, base)
    assert index.tolist() == [1, 2, 4, 0]
    np.testing.assert_allclose(weight, [5 * 0.5 / 6, 1, 1, 0])


def test_the_space_before_a_text_is_on_neither_side() -> None:
    value, base = [b"ab", b" ", b"c"], [b" ab", b" ", b"ab", b"c"]
    (index, weight), counts = _map([[0, 2]], [[0, 3]], value, base)
    assert counts.unequal == ()
    assert index.tolist()[0] == 0
    np.testing.assert_allclose(weight[0], 2 / 3)
    # A lone space token before the text has no bytes left, and aligns with nothing.
    _, counts = _map([[0, 2]], [[1, 2, 3]], value, base)
    assert counts.aligned.tolist() == [0, 0, 1, 1]


def test_texts_with_other_bytes_are_left_out_and_named() -> None:
    value, base = [b"a", b"b"], [b"a", b"B"]
    (index, weight), counts = _map([[0], [0, 1], [0]], [[0], [0, 1], [0]], value, base)
    assert counts.unequal == (1,)
    assert counts.aligned.tolist() == [2, 0]
    assert (index.tolist(), weight.tolist()) == ([0, 0], [1, 0])


def test_chunks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    table = [b"a", b"b", b"ab", b"ba", b" "]
    texts = ["".join(random.choice(list("ab "), 20)).encode() for _ in range(30)]
    rows = [_greedy(text, table) for text in texts]
    others = [_greedy(text, table[:2] + table[4:]) for text in texts]
    whole, _ = _map(rows, others, table, table[:2] + table[4:])
    monkeypatch.setattr("ivl_jax.vocabulary.byte_offsets._TOKENS_AT_ONCE", 50)
    parts, _ = _map(rows, others, table, table[:2] + table[4:])
    np.testing.assert_array_equal(parts[0], whole[0])
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)


def test_same_vocabulary_gives_the_identity_even_where_bytes_occur_twice() -> None:
    table = [None, b"A", b"\n", b"AB", b"A"]  # say <0x41> and A
    (index, weight), _ = _map([[4, 3, 2]], [[4, 3, 2]], table, table)
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert weight.tolist() == [0, 1, 1, 1, 1]


def test_toy_tokenizers_equal_the_definition_where_tokens_split_characters(
    byte_level_tokenizer, metaspace_tokenizer, toy_corpus
) -> None:
    sides = []
    for tokenizer in (byte_level_tokenizer(), metaspace_tokenizer(), byte_level_tokenizer(300)):
        rows = tokenizer(toy_corpus)["input_ids"]
        table = ordinary_token_bytes(tokenizer)
        # The texts do hold tokens that are no character by themselves.
        assert any(table[t] and table[t][0] >= 0x80 and len(table[t]) == 1 for t in rows[2])
        sides.append((rows, table))
    for value_rows, value_bytes in sides:
        for base_rows, base_bytes in sides:
            got, counts = _map(value_rows, base_rows, value_bytes, base_bytes)
            assert counts.unequal == ()
            assert_same_map(got, plain_map(value_rows, base_rows, value_bytes, base_bytes))


def test_real_tokenizers_equal_the_definition(
    llama2_tokenizer_dir, gpt2_tokenizer_dir, stories260k_dir, gsm8k_dir
) -> None:
    texts = [*read_texts([gsm8k_dir / "test.jsonl"])[0][:20], "naïve 水と火 🙂\n\n  two spaces"]
    sides = []
    for folder in (gpt2_tokenizer_dir, llama2_tokenizer_dir, stories260k_dir):
        tokenizer = load_tokenizer(folder)
        sides.append((tokenizer(texts)["input_ids"], ordinary_token_bytes(tokenizer)))
    gpt2, llama2, stories = sides
    for value, base in ((gpt2, llama2), (stories, llama2), (llama2, gpt2)):
        got, counts = _map(value[0], base[0], value[1], base[1])
        assert counts.unequal == ()
        # The plain one is quadratic in the vocabulary: only the ids seen, and a few more.
        assert_same_map(*_on_seen(got, value, base))


def _on_seen(got, value, base):
    """The map and the plain one, both restricted to the base tokens that the texts show."""
    seen_base = sorted({token for row in base[0] for token in row})
    # All value tokens that the plain one can reach: those seen, and those with equal bytes.
    wanted = {base[1][token] for token in seen_base}
    seen_value = {token for row in value[0] for token in row}
    kept_value = sorted(
        seen_value | {token for token, spelled in enumerate(value[1]) if spelled in wanted}
    )
    kept_base = sorted(
        set(seen_base) | {token for token, spelled in enumerate(base[1]) if spelled in wanted}
    )
    value_at, base_at = (
        {token: k for k, token in enumerate(kept)} for kept in (kept_value, kept_base)
    )
    index, weight = plain_map(
        [[value_at[token] for token in row] for row in value[0]],
        [[base_at[token] for token in row] for row in base[0]],
        [value[1][token] for token in kept_value],
        [base[1][token] for token in kept_base],
    )
    index = np.where(weight > 0, np.array(kept_value)[index], 0)
    return (got[0][kept_base], got[1][kept_base]), (index, weight)
