"""The authors' map equals a plain implementation of its description, cell by cell."""

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.token_bytes import ordinary_token_bytes
from ivl_jax.tokenizer import load_tokenizer
from ivl_jax.vocabulary.dtw import (
    count_coaligned,
    normalise_counts,
    pair_costs,
    token_strings,
    warping_paths,
)
from ivl_jax.vocabulary.pair_counts import PairCounts
from ivl_jax.vocabulary.texts import read_texts


def plain_edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


@functools.cache
def plain_cost(a: str, b: str) -> float:
    distance = plain_edit_distance(a, b)
    return distance * 0.1 if a in b or b in a else float(distance)


def plain_path(costs: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Warping path from the end to (0, 0), step by step as described."""
    n, m = len(costs), len(costs[0])
    total: dict[tuple[int, int], float] = {}
    infinite = float("inf")
    for i in range(n):
        for j in range(m):
            before = [total.get(at, infinite) for at in ((i - 1, j), (i, j - 1), (i - 1, j - 1))]
            total[i, j] = costs[i][j] + (0.0 if i == j == 0 else min(before))
    i, j = n - 1, m - 1
    path = [(i, j)]
    while (i, j) != (0, 0):
        # In this order: the first of equal ones is taken.
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda at: total.get(at, infinite))
        path.append((i, j))
    return path


def plain_map(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    value_strings: Sequence[str],
    base_strings: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """The whole algorithm on a dense matrix."""
    counts = np.zeros((len(base_strings), len(value_strings)))
    for value_row, base_row in pairs:
        costs = [
            [plain_cost(value_strings[v], base_strings[b]) for b in base_row] for v in value_row
        ]
        for i, j in plain_path(costs):
            counts[base_row[j], value_row[i]] += 1
    return plain_normalised(counts)


def plain_normalised(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    observed = counts > 0
    matrix = np.where(observed, counts - counts.mean(axis=1, keepdims=True), 0.0)
    low, high = matrix.min(axis=0), matrix.max(axis=0)
    span = np.where(high == low, 1.0, high - low)
    matrix = np.where(observed, (matrix - low) / span, 0.0)
    index = matrix.argmax(axis=1)
    weight = matrix[np.arange(len(matrix)), index]
    return np.where(weight > 0, index, 0), weight


def _map(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    value_strings: Sequence[str],
    base_strings: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    counts = count_coaligned(
        [np.array(value, np.int32) for value, _ in pairs],
        [np.array(base, np.int32) for _, base in pairs],
        value_strings=value_strings,
        base_strings=base_strings,
        progress=lambda done: None,
    )
    return normalise_counts(
        counts, base_vocab_size=len(base_strings), value_vocab_size=len(value_strings)
    )


def assert_same_map(
    got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)


@given(st.lists(st.text("ab", max_size=4), min_size=1, max_size=6), st.data())
def test_cost_is_edit_distance_and_a_tenth_where_one_contains_the_other(
    strings: list[str], data: st.DataObject
) -> None:
    others = data.draw(st.lists(st.text("abc", max_size=4), min_size=1, max_size=6))
    costs = pair_costs(strings, others)
    expected = [[plain_cost(a, b) for b in others] for a in strings]
    np.testing.assert_array_equal(costs, expected)


@pytest.mark.parametrize(
    ("a", "b", "cost"),
    [
        ("", "abc", 3 * 0.1),
        ("", "", 0.0),
        ("ab", "xabx", 2 * 0.1),
        ("ab", "axb", 1.0),
        ("a", "b", 1),
    ],
)
def test_the_empty_string_is_contained_and_a_subsequence_is_not(
    a: str, b: str, cost: float
) -> None:
    assert pair_costs([a], [b]) == pair_costs([b], [a]) == cost


def warping_paths_of(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[tuple[int, int]]]:
    """Each table's path, from tables of any sizes; entries beyond a table must not matter."""
    n, m = (np.array(sizes) for sizes in zip(*((len(t), len(t[0])) for t in tables), strict=True))
    totals = np.full((n.max() + 1, m.max() + 1, len(tables)), -1e9)
    for k, table in enumerate(tables):
        totals[1 : n[k] + 1, 1 : m[k] + 1, k] = table
    which, i, j = warping_paths(totals, n, m)
    return [
        list(zip(i[which == k].tolist(), j[which == k].tolist(), strict=True))
        for k in range(len(tables))
    ]


# Few different costs, so that ties are everywhere.
_tables = st.integers(1, 7).flatmap(
    lambda m: st.lists(
        st.lists(
            st.sampled_from([0.0, 0.1, 0.2, 0.30000000000000004, 1.0]), min_size=m, max_size=m
        ),
        min_size=1,
        max_size=7,
    )
)


@settings(deadline=None)
@given(st.lists(_tables, min_size=1, max_size=5))
def test_many_warping_paths_at_once_are_each_the_plain_path(
    tables: list[list[list[float]]],
) -> None:
    assert warping_paths_of(tables) == [plain_path(table) for table in tables]


def test_ties_prefer_the_diagonal_then_the_value_then_the_base() -> None:
    assert warping_paths_of([[[0, 0], [0, 0]]]) == [[(1, 1), (0, 0)]]
    # The corner is dearer than both sides, and these are equal: one step back in the value.
    [path] = warping_paths_of([[[0, 0, 1], [0, 5, 0], [1, 0, 0]]])
    assert path[:2] == [(2, 2), (1, 2)]


@settings(deadline=None)
@given(st.data())
def test_sparse_normalisation_equals_the_dense_one(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    cells = data.draw(st.lists(st.integers(0, 4), min_size=36, max_size=36))
    counts = np.array(cells[: shape[0] * shape[1]], float).reshape(shape)
    base_ids, value_ids = np.nonzero(counts)
    sparse = PairCounts(base_ids, value_ids, counts[base_ids, value_ids])
    got = normalise_counts(sparse, base_vocab_size=shape[0], value_vocab_size=shape[1])
    assert got[0].dtype == np.int32
    assert got[1].dtype == np.float32
    assert_same_map(got, plain_normalised(counts))


def test_column_without_a_span_is_divided_by_one() -> None:
    # Every base token met the only value token equally often: all entries are the column's lowest.
    counts = PairCounts(np.arange(3), np.zeros(3, int), np.full(3, 2.0))
    index, weight = normalise_counts(counts, base_vocab_size=3, value_vocab_size=1)
    assert index.tolist() == [0, 0, 0]
    assert weight.tolist() == [0, 0, 0]


def test_first_of_equal_entries_is_kept_and_unseen_rows_are_unmapped() -> None:
    # Both columns reach 1 in row 0.
    counts = PairCounts(np.array([0, 0, 2]), np.array([1, 3, 3]), np.array([5.0, 5.0, 1.0]))
    index, weight = normalise_counts(counts, base_vocab_size=3, value_vocab_size=4)
    assert index.tolist() == [1, 0, 3]
    np.testing.assert_allclose(weight, [1.0, 0.0, (1 - 0.25) / (5 - 2.5)])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_map_equals_the_plain_one_on_random_texts(data: st.DataObject) -> None:
    vocabulary = st.lists(st.text("abc", max_size=3), min_size=1, max_size=6)
    value_strings, base_strings = data.draw(vocabulary), data.draw(vocabulary)
    value_row = st.lists(st.integers(0, len(value_strings) - 1), min_size=1, max_size=8)
    base_row = st.lists(st.integers(0, len(base_strings) - 1), min_size=1, max_size=8)
    pairs = data.draw(st.lists(st.tuples(value_row, base_row), min_size=1, max_size=4))
    got = _map(pairs, value_strings, base_strings)
    assert_same_map(got, plain_map(pairs, value_strings, base_strings))


def test_texts_without_tokens_are_left_out() -> None:
    strings = ["a", "b"]
    pairs = [([0, 1], [1, 0]), ([], [0]), ([1], []), ([], [])]
    assert_same_map(_map(pairs, strings, strings), _map(pairs[:1], strings, strings))
    assert not _map(pairs[1:], strings, strings)[1].any()


def test_many_texts_of_all_lengths_are_counted_like_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    strings = ["".join(random.choice(list("abcd"), 3)) for _ in range(30)]
    pairs = [
        (random.integers(0, 30, n).tolist(), random.integers(0, 30, m).tolist())
        for n, m in random.integers(1, 40, (30, 2))
    ]
    expected = plain_map(pairs, strings, strings)
    assert_same_map(_map(pairs, strings, strings), expected)
    monkeypatch.setattr("ivl_jax.vocabulary.dtw._CELLS_AT_ONCE", 2000)
    assert_same_map(_map(pairs, strings, strings), expected)


@pytest.mark.parametrize("frequent", [1, 5, 100])
def test_costs_of_rare_tokens_are_those_of_frequent_ones(
    frequent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(1)
    # Some strings twice: a word with its mark and one without.
    strings = ["".join(random.choice(list("ab"), random.integers(0, 4))) for _ in range(20)]
    pairs = [
        (random.integers(0, 20, n).tolist(), random.integers(0, 20, m).tolist())
        for n, m in random.integers(1, 12, (10, 2))
    ]
    monkeypatch.setattr("ivl_jax.vocabulary.dtw._CELLS_PER_FREQUENT_COST", 1)
    monkeypatch.setattr("ivl_jax.vocabulary.dtw._FREQUENT", frequent)
    assert_same_map(_map(pairs, strings, strings[::-1]), plain_map(pairs, strings, strings[::-1]))


def test_word_start_marks_are_removed_by_tokenizer_kind(
    byte_level_tokenizer, metaspace_tokenizer
) -> None:
    for make, mark in ((byte_level_tokenizer, "Ġ"), (metaspace_tokenizer, "▁")):
        tokenizer = make()
        raw = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert any(text.startswith(mark) and len(text) > 1 for text in raw)
        strings = token_strings(tokenizer, ordinary_token_bytes(tokenizer))
        assert strings == [text.replace(mark, "") for text in raw]
        assert not any(mark in text for text in strings)


@pytest.mark.parametrize("exchanged", [False, True])
def test_map_of_real_tokenizers_equals_the_plain_one(
    llama2_tokenizer_dir, gpt2_tokenizer_dir, gsm8k_dir, exchanged: bool
) -> None:
    texts = read_texts([gsm8k_dir / "test.jsonl"])[0][:4]
    sides = []
    for folder, mark in ((gpt2_tokenizer_dir, "Ġ"), (llama2_tokenizer_dir, "▁")):
        tokenizer = load_tokenizer(folder)
        strings = token_strings(tokenizer, ordinary_token_bytes(tokenizer))
        assert strings[1000] == tokenizer.convert_ids_to_tokens(1000).replace(mark, "")
        sides.append((tokenizer(texts)["input_ids"], strings))
    (value_rows, value_strings), (base_rows, base_strings) = sides[::-1] if exchanged else sides
    pairs = list(zip(value_rows, base_rows, strict=True))
    index, weight = _map(pairs, value_strings, base_strings)
    # The plain one on the seen tokens and one unseen row; the mean is over the full row.
    base_ids = sorted({token for row in base_rows for token in row})
    value_ids = sorted({token for row in value_rows for token in row})
    base_at, value_at = ({token: k for k, token in enumerate(ids)} for ids in (base_ids, value_ids))
    counts = np.zeros((len(base_ids) + 1, len(value_ids)))
    for value_row, base_row in pairs:
        costs = [
            [plain_cost(value_strings[v], base_strings[b]) for b in base_row] for v in value_row
        ]
        for i, j in plain_path(costs):
            counts[base_at[base_row[j]], value_at[value_row[i]]] += 1
    observed = counts > 0
    matrix = observed * (counts - counts.sum(axis=1, keepdims=True) / len(value_strings))
    low, high = matrix.min(axis=0), matrix.max(axis=0)
    matrix = observed * (matrix - low) / np.where(high == low, 1, high - low)
    expected_index = np.array(value_ids)[matrix.argmax(axis=1)][:-1]
    np.testing.assert_array_equal(index[base_ids], expected_index)
    np.testing.assert_allclose(weight[base_ids], matrix.max(axis=1)[:-1], rtol=1e-6)
    unseen = np.setdiff1d(np.arange(len(base_strings)), base_ids)
    assert not weight[unseen].any()
    assert not index[unseen].any()
