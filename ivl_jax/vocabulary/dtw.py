"""The authors' vocabulary map: dynamic time warping with edit distance, counted and normalised.

In: texts tokenised by both tokenizers, the strings of the tokens. Out: how often base and value
tokens were aligned, and from that the best value token of each base token with its weight.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from ivl_jax.vocabulary.pair_counts import (
    PairCounts,
    best_per_base_token,
    count_pairs,
    merge_counts,
)

# Texts aligned at once, and total cells of their tables: 48 MB of float64, one buffer per thread.
# With fewer texts NumPy waits for Python; a new buffer per group costs more than the paths do.
_THREADS = min(4, os.cpu_count() or 1)
_TEXTS_AT_ONCE = 128
_CELLS_AT_ONCE = 6_000_000
# Costs between the most frequent tokens of both vocabularies are computed once: for at most this
# many tokens (50 MB), and one cost per this many table cells, so that a few texts do not wait.
_FREQUENT = 2500
_CELLS_PER_FREQUENT_COST = 8
_CONTAINED = 0.1


class _CostTable(NamedTuple):
    """Costs between the frequent tokens of both vocabularies; others are computed per text."""

    costs: np.ndarray
    """[Rv Rb] float64."""
    value_rank: np.ndarray
    """[Vv] int64, the row of each value token; −1 for rare ones."""
    base_rank: np.ndarray
    """[Vb] int64, the column of each base token; −1 for rare ones."""


def token_strings(tokenizer: Any, token_bytes: Sequence[bytes | None]) -> list[str]:
    """The tokens as the edit distance sees them: without the word-start mark.

    Args:
        tokenizer: a transformers tokenizer.
        token_bytes: by id, the bytes of each ordinary token and None elsewhere.

    Returns:
        By id, the token's string in the tokenizer's own alphabet, every word-start mark removed.

    Source:
        The authors' code strips one mark per tokenizer class, the wrong one for Llama's fast class.
        Here the mark is the single character, other than the space itself, that stands for a
        space: Ġ in byte-level BPE, ▁ in SentencePiece.
    """
    strings = [""] * len(token_bytes)
    for text, token_id in tokenizer.get_vocab().items():
        strings[token_id] = text
    marks = {
        text
        for text, spelled in zip(strings, token_bytes, strict=True)
        if spelled == b" " and len(text) == 1 and text != " "
    }
    for mark in marks:
        strings = [text.replace(mark, "") if mark in text else text for text in strings]
    return strings


def count_coaligned(
    value_rows: Sequence[np.ndarray],
    base_rows: Sequence[np.ndarray],
    *,
    value_strings: Sequence[str],
    base_strings: Sequence[str],
    progress: Callable[[int], None],
) -> PairCounts:
    """Align every text's two token sequences and count which tokens are aligned.

    Args:
        value_rows: per text, the value network's token ids (special tokens included).
        base_rows: per text, the base's.
        value_strings: by id, what `token_strings` returns.
        base_strings: the same for the base.
        progress: called with the number of texts just done.

    Returns:
        For each pair of tokens, the number of warping-path steps at which they are aligned.

    Source:
        arXiv 2410.21027 and the authors' code: the value's tokens are the first series; the path is
        traced back from the end to the smallest neighbour, ties going to the diagonal, then to a
        step in the value, then in the base. Float64 throughout, like theirs: rounding decides some
        ties.
    """
    sizes = np.array([[len(row) for row in rows] for rows in (value_rows, base_rows)])
    groups = list(_groups(*sizes.tolist()))
    widest = max((_cells(sizes[:, group]) for group in groups), default=0)
    strings = np.array(value_strings, object), np.array(base_strings, object)
    table = _frequent_costs((value_rows, base_rows), strings)
    buffers: SimpleQueue[np.ndarray] = SimpleQueue()
    for _ in range(_THREADS):
        buffers.put(np.empty(widest))

    def count(group: list[int]) -> PairCounts:
        buffer = buffers.get()
        n, m = sizes[:, group].max(axis=1)
        totals = buffer[: _cells(sizes[:, group])].reshape(n + 1, m + 1, len(group))
        values, bases = ([rows[row] for row in group] for rows in (value_rows, base_rows))
        try:
            _fill(totals, table, (values, bases), strings)
            which, i, j = warping_paths(totals, *sizes[:, group])
        finally:
            buffers.put(buffer)
        value_ids, base_ids = _padded(values)[i, which], _padded(bases)[j, which]
        ones = np.ones(len(which))
        return count_pairs(base_ids, value_ids, ones, value_vocab_size=len(value_strings))

    parts = []
    # NumPy releases the interpreter lock while it gathers and adds.
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, part in zip(groups, pool.map(count, groups), strict=True):
            parts.append(part)
            progress(len(group))
    return merge_counts(parts, value_vocab_size=len(value_strings))


def pair_costs(values: Sequence[str], bases: Sequence[str]) -> np.ndarray:
    """The cost of every pair of strings.

    Args:
        values: n strings of value tokens, without word-start marks.
        bases: m strings of base tokens, also without marks.

    Returns:
        [n m] float64: the edit distance of the two, times 0.1 where one contains the other (the
        empty string is contained in every string).
    """
    distance = cdist(values, bases, scorer=Levenshtein.distance, dtype=np.int32)
    # One contains the other only where the distance equals the difference of their lengths.
    lengths = np.fromiter(map(len, values), np.int32), np.fromiter(map(len, bases), np.int32)
    candidates = np.nonzero(distance == np.abs(lengths[0][:, None] - lengths[1][None, :]))
    contained = [
        values[i] in bases[j] or bases[j] in values[i]
        for i, j in zip(*(axis.tolist() for axis in candidates), strict=True)
    ]
    costs = distance.astype(np.float64)
    i, j = (axis[contained] for axis in candidates)
    costs[i, j] *= _CONTAINED
    return costs


def warping_paths(
    totals: np.ndarray, n: np.ndarray, m: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest warping path through each of K tables at once.

    Args:
        totals: [max n + 1, max m + 1, K] float64, contiguous. Table k has its costs in
            `[1 : n[k] + 1, 1 : m[k] + 1, k]`, index 1 for the first token; other entries may be
            anything finite. Overwritten with the cost of the cheapest path to each cell. With the
            tables along the last axis, all advance by one strided slice per anti-diagonal.
        n: [K] length of each first series, at least 1.
        m: [K] length of each second series, at least 1.

    Returns:
        Three [steps] int64 arrays over all paths: which table, index i in the first series, index
        j in the second. Each path runs from (n − 1, m − 1) back to (0, 0); the steps of different
        tables are interleaved.
    """
    rows, width, count = totals.shape
    totals[0], totals[:, 0] = np.inf, np.inf
    totals[0, 0] = 0.0
    flat = totals.reshape(-1, count)
    smallest = np.empty((min(rows, width), count))
    for diagonal in range(2, rows + width - 1):
        top, bottom = max(1, diagonal - width + 1), min(rows - 1, diagonal - 1)
        first = top * width + diagonal - top
        last = first + (bottom - top) * (width - 1)
        here, up, left, corner = (
            flat[first - back : last - back + 1 : width - 1] for back in (0, width, 1, width + 1)
        )
        best = smallest[: bottom - top + 1]
        np.minimum(up, left, out=best)
        np.minimum(best, corner, out=best)
        here += best
    # Current cell of each path: row · width + column; a path ends when it steps into the border.
    which, place = np.arange(count), n.astype(np.int64) * width + m
    steps = totals.reshape(-1)
    visited = []
    while len(place):
        visited.append((which, place))
        here = place * count + which
        corner, up, left = (steps[here - back * count] for back in (width + 1, width, 1))
        straight = np.where(up <= left, width, 1)
        place = place - np.where(corner <= np.minimum(up, left), width + 1, straight)
        going = place > 0
        if not going.all():
            which, place = which[going], place[going]
    tables, places = (np.concatenate(axis) for axis in zip(*visited, strict=True))
    i, j = np.divmod(places, width)
    return tables, i - 1, j - 1


def normalise_counts(
    counts: PairCounts, *, base_vocab_size: int, value_vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The authors' normalisation of the counts, and each base token's best value token.

    The mean of its row over all value tokens is subtracted from each count; each column is then
    scaled to [0, 1], where pairs that were never seen count as 0 in its minimum and maximum (a
    column whose span is 0 is divided by 1); each row keeps its first largest entry.

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
    # Pairs never seen count as 0, if the column has any.
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
    """Groups of texts of similar lengths that are aligned at once; empty texts are left out."""
    rows = [r for r, both in enumerate(zip(value_lengths, base_lengths, strict=True)) if all(both)]
    # Grouped by both lengths, 13 % of the cells are padding on GSM8K; by one length alone, 25 %.
    rows.sort(key=lambda row: (value_lengths[row] // 16, base_lengths[row]))
    group: list[int] = []
    n = m = 0
    for row in rows:
        n, m = max(n, value_lengths[row]), max(m, base_lengths[row])
        cells = (len(group) + 1) * (n + 1) * (m + 1)
        if group and (cells > _CELLS_AT_ONCE or len(group) == _TEXTS_AT_ONCE):
            yield group
            group, n, m = [], value_lengths[row], base_lengths[row]
        group.append(row)
    if group:
        yield group


def _cells(sizes: np.ndarray) -> int:
    """Cells of the bordered tables of a group, padded to the largest of each axis."""
    n, m = sizes.max(axis=1)
    return int((n + 1) * (m + 1) * sizes.shape[1])


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[longest K] int64, one column per text, 0 beyond its end."""
    padded = np.zeros((max(map(len, rows)), len(rows)), np.int64)
    for k, row in enumerate(rows):
        padded[: len(row), k] = row
    return padded


def _frequent_costs(
    rows: tuple[Sequence[np.ndarray], Sequence[np.ndarray]], strings: tuple[np.ndarray, np.ndarray]
) -> _CostTable:
    """Costs between the most frequent strings; tokens that differ only by a mark share a string."""
    cells = sum(len(value) * len(base) for value, base in zip(*rows, strict=True))
    most = min(_FREQUENT, math.isqrt(cells // _CELLS_PER_FREQUENT_COST) + 1)
    frequent, ranks = [], []
    for side_rows, side_strings in zip(rows, strings, strict=True):
        seen = np.bincount(np.concatenate(side_rows), minlength=len(side_strings))
        tokens = np.flatnonzero(seen)
        times: dict[str, int] = {}
        for text, count in zip(side_strings[tokens], seen[tokens].tolist(), strict=True):
            times[text] = times.get(text, 0) + count
        texts = sorted(times, key=times.__getitem__, reverse=True)[:most]
        rank_of = {text: rank for rank, text in enumerate(texts)}
        rank = np.full(len(side_strings), -1, np.int64)
        rank[tokens] = [rank_of.get(text, -1) for text in side_strings[tokens]]
        frequent.append(texts)
        ranks.append(rank)
    return _CostTable(pair_costs(*frequent), *ranks)


def _fill(
    totals: np.ndarray,
    table: _CostTable,
    rows: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    strings: tuple[np.ndarray, np.ndarray],
) -> None:
    """Write the costs of a group's texts: from the table, then those of rare tokens over them."""
    n, m, count = totals.shape
    value_rank, base_rank = table.value_rank[_padded(rows[0])], table.base_rank[_padded(rows[1])]
    columns = np.maximum(base_rank, 0)
    starts = np.maximum(value_rank, 0) * table.costs.shape[1]
    places = np.empty((m - 1, count), np.int64)
    for i in range(1, n):
        np.add(columns, starts[i - 1], out=places)
        np.take(table.costs, places, out=totals[i, 1:], mode="clip")
    for k, (values, bases) in enumerate(zip(*rows, strict=True)):
        rare_values = np.flatnonzero(value_rank[: len(values), k] < 0)
        rare_bases = np.flatnonzero(base_rank[: len(bases), k] < 0)
        value_texts, base_texts = strings[0][values], strings[1][bases]
        if len(rare_values):
            costs = pair_costs(value_texts[rare_values].tolist(), base_texts.tolist())
            totals[rare_values + 1, 1 : len(bases) + 1, k] = costs
        if len(rare_bases):
            costs = pair_costs(value_texts.tolist(), base_texts[rare_bases].tolist())
            totals[1 : len(values) + 1, rare_bases + 1, k] = costs
