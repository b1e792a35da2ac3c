"""The authors' vocabulary map: dynamic time warping with edit distance, counted and normalised.

In: texts tokenised by both tokenizers, the strings of the tokens. Out: how often base and value
tokens were aligned, and from that the best value token of each base token with its weight.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from ivl_jax.vocabulary.pair_counts import (
    PairCounts,
    best_per_base_token,
    count_pairs,
    merge_counts,
)

# Texts aligned at once, and cells of their padded tables together: 12 MB of float64. Fewer texts
# leave numpy waiting for Python; more cells fall out of the cache (measured: 2 × slower at 4 ×).
_TEXTS_AT_ONCE = 64
_CELLS_AT_ONCE = 1_500_000
_CONTAINED = 0.1


def token_strings(tokenizer: Any, token_bytes: Sequence[bytes | None]) -> list[str]:
    """The tokens as the edit distance sees them: without the word-start mark.

    Args:
        tokenizer: a transformers tokenizer.
        token_bytes: by id, the bytes of each ordinary token and None elsewhere.

    Returns:
        By id, the token's string in the tokenizer's own alphabet, every word-start mark removed.

    Source:
        The authors' code strips one mark a tokenizer class, the wrong one for Llama's fast class.
        Here the mark is the single character, other than the space itself, that stands for a
        space: Ġ in byte-level BPE, ▁ in SentencePiece.
    """
    strings = [text or "" for text in tokenizer.convert_ids_to_tokens(range(len(token_bytes)))]
    marks = {
        text
        for text, spelled in zip(strings, token_bytes, strict=True)
        if spelled == b" " and len(text) == 1 and text != " "
    }
    for mark in marks:
        strings = [text.replace(mark, "") for text in strings]
    return strings


def count_coaligned(
    value_rows: Sequence[np.ndarray],
    base_rows: Sequence[np.ndarray],
    *,
    value_strings: Sequence[str],
    base_strings: Sequence[str],
    progress: Callable[[int], None],
) -> PairCounts:
    """Align every text's two token sequences and count which tokens meet.

    Args:
        value_rows: per text, the value network's token ids (special tokens included).
        base_rows: per text, the base's.
        value_strings: by id, what `token_strings` gives.
        base_strings: likewise.
        progress: called with the number of texts just done.

    Returns:
        For each pair of tokens, the number of steps of the warping paths at which they meet.

    Source:
        arXiv 2410.21027 and the authors' code: the value's tokens are the first series; the path
        goes back from the end by the smallest neighbour, ties to the diagonal, then to a step in
        the value, then in the base. Float64 throughout, as theirs: rounding decides some ties.
    """
    strings = (np.array(value_strings, object), np.array(base_strings, object))
    parts = []
    for group in _groups([len(row) for row in value_rows], [len(row) for row in base_rows]):
        tables = [
            pair_costs(
                value_rows[row], base_rows[row], value_strings=strings[0], base_strings=strings[1]
            )
            for row in group
        ]
        which, i, j = warping_paths(tables)
        value_ids, base_ids = (
            _padded([rows[row] for row in group])[which, steps]
            for rows, steps in ((value_rows, i), (base_rows, j))
        )
        parts.append(
            count_pairs(
                base_ids, value_ids, np.ones(len(which)), value_vocab_size=len(value_strings)
            )
        )
        progress(len(group))
    return merge_counts(parts, value_vocab_size=len(value_strings))


def pair_costs(
    value_row: np.ndarray,
    base_row: np.ndarray,
    *,
    value_strings: np.ndarray,
    base_strings: np.ndarray,
) -> np.ndarray:
    """The cost of every pair of a text's tokens.

    Args:
        value_row: [n] ids of the value's tokens.
        base_row: [m] ids of the base's.
        value_strings: by id, strings without word marks (an object array).
        base_strings: likewise.

    Returns:
        [n m] float64: the edit distance of the two strings, times 0.1 where one contains the other
        (the empty string is contained in every string).
    """
    value_ids, value_at = np.unique(value_row, return_inverse=True)
    base_ids, base_at = np.unique(base_row, return_inverse=True)
    values, bases = value_strings[value_ids].tolist(), base_strings[base_ids].tolist()
    distance = cdist(values, bases, scorer=Levenshtein.distance, dtype=np.int32)
    # One can contain the other only where the distance is the difference of their lengths.
    lengths = np.fromiter(map(len, values), np.int32), np.fromiter(map(len, bases), np.int32)
    candidates = np.nonzero(distance == np.abs(lengths[0][:, None] - lengths[1][None, :]))
    contained = [
        values[i] in bases[j] or bases[j] in values[i]
        for i, j in zip(*(axis.tolist() for axis in candidates), strict=True)
    ]
    costs = distance.astype(np.float64)
    i, j = (axis[contained] for axis in candidates)
    costs[i, j] *= _CONTAINED
    return costs[value_at][:, base_at]


def warping_paths(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest warping path through each table, many tables at a time.

    Args:
        tables: each [n m] of costs, n and m at least 1; the first axis is the first series.

    Returns:
        Three [steps] int64 arrays over all paths: which table, index i in it, index j. Each path
        runs from (n − 1, m − 1) back to (0, 0); the steps of different tables are mixed.
    """
    count = len(tables)
    n, m = (max(table.shape[axis] for table in tables) for axis in (0, 1))
    padded = np.zeros((count, n, m))
    for k, table in enumerate(tables):
        padded[k, : table.shape[0], : table.shape[1]] = table
    # The tables lie side by side in the last axis, with a border of infinite cost before them, so
    # that a whole anti-diagonal of all of them is one strided slice of rows.
    totals = np.full((n + 1, m + 1, count), np.inf)
    totals[1:, 1:] = padded.transpose(1, 2, 0)
    totals[0, 0] = 0.0
    width = m + 1
    flat = totals.reshape(-1, count)
    smallest = np.empty((min(n, m), count))
    for diagonal in range(2, n + m + 1):
        top, bottom = max(1, diagonal - m), min(n, diagonal - 1)
        first = top * width + diagonal - top
        last = first + (bottom - top) * m
        here, up, left, corner = (
            flat[first - back : last - back + 1 : m] for back in (0, width, 1, width + 1)
        )
        best = smallest[: bottom - top + 1]
        np.minimum(up, left, out=best)
        np.minimum(best, corner, out=best)
        here += best
    return _back(totals.ravel(), tables, width)


def normalise_counts(
    counts: PairCounts, *, base_vocab_size: int, value_vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The authors' normalisation of the counts, and each base token's best value token.

    From each count the mean of its row over all value tokens is subtracted; each column is then
    scaled to run from 0 to 1, pairs that were never seen counting as 0 in its smallest and largest
    entry (a column without a span is divided by 1); each row keeps its first largest entry.

    Args:
        counts: from `count_coaligned`.
        base_vocab_size: rows Vb.
        value_vocab_size: columns Vv.

    Returns:
        value_index [Vb] int32 and weight [Vb] float32; 0 and 0 where nothing was seen.

    Source:
        The authors' code, on a dense matrix in float32; here on the pairs seen, in float64.
    """
    base_ids, value_ids, amounts = counts
    row_sums = np.bincount(base_ids, weights=amounts, minlength=base_vocab_size)
    centred = amounts - row_sums[base_ids] / value_vocab_size
    # A pair never seen enters as 0, unless the column has none such.
    seen = np.bincount(value_ids, minlength=value_vocab_size)
    low = np.where(seen < base_vocab_size, 0.0, np.inf)
    high = np.where(seen < base_vocab_size, 0.0, -np.inf)
    np.minimum.at(low, value_ids, centred)
    np.maximum.at(high, value_ids, centred)
    span = high - low
    span[span == 0] = 1.0
    scores = (centred - low[value_ids]) / span[value_ids]
    index, weight = best_per_base_token(counts, scores, base_vocab_size=base_vocab_size)
    return index, weight.astype(np.float32)


def _groups(value_lengths: Sequence[int], base_lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts of about equal lengths, as many as are aligned at once; empty ones left out."""
    rows = [r for r, both in enumerate(zip(value_lengths, base_lengths, strict=True)) if all(both)]
    rows.sort(key=lambda row: (value_lengths[row], base_lengths[row]))
    group: list[int] = []
    widest = 0
    for row in rows:
        grown = max(widest, base_lengths[row])
        cells = (len(group) + 1) * (value_lengths[row] + 1) * (grown + 1)
        if group and (cells > _CELLS_AT_ONCE or len(group) == _TEXTS_AT_ONCE):
            yield group
            group, grown = [], base_lengths[row]
        group.append(row)
        widest = grown
    if group:
        yield group


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for k, row in enumerate(rows):
        padded[k, : len(row)] = row
    return padded


def _back(
    totals: np.ndarray, tables: Sequence[np.ndarray], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Walk all paths back at once through the bordered totals, the table the fastest axis."""
    count = len(tables)
    which = np.arange(count)
    # Where each path stands: row · width + column in the bordered table; it ends at the border.
    place = np.array([table.shape[0] * width + table.shape[1] for table in tables])
    visited = []
    while len(place):
        visited.append((which, place))
        here = place * count + which
        corner, up, left = (totals[here - back * count] for back in (width + 1, width, 1))
        straight = np.where(up <= left, width, 1)
        place = place - np.where(corner <= np.minimum(up, left), width + 1, straight)
        going = place > 0
        if not going.all():
            which, place = which[going], place[going]
    tables_visited, places = (np.concatenate(axis) for axis in zip(*visited, strict=True))
    i, j = np.divmod(places, width)
    return tables_visited, i - 1, j - 1
