"""How often base and value tokens are aligned: a sparse V×V table, never a dense one.

In: pairs of token ids with amounts, chunk by chunk. Out: each pair once, with its sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PairCounts(NamedTuple):
    """Each (base, value) pair that was seen, once, by base id, then by value id."""

    base_ids: np.ndarray
    """[P] int64."""
    value_ids: np.ndarray
    """[P] int64."""
    amounts: np.ndarray
    """[P] float64, positive."""


def count_pairs(
    base_ids: np.ndarray, value_ids: np.ndarray, amounts: np.ndarray, *, value_vocab_size: int
) -> PairCounts:
    """Sum the amounts of equal pairs.

    Args:
        base_ids: [N] ids; pairs may repeat.
        value_ids: [N] ids below `value_vocab_size`.
        amounts: [N] float64, added in this order.
        value_vocab_size: number of ids of the value network's tokenizer.

    Returns:
        Each pair once.
    """
    keys = base_ids.astype(np.int64) * value_vocab_size + value_ids
    unique, inverse = np.unique(keys, return_inverse=True)
    sums = np.bincount(inverse, weights=amounts, minlength=len(unique))
    base, value = np.divmod(unique, value_vocab_size)
    return PairCounts(base, value, sums)


def merge_counts(parts: Sequence[PairCounts], *, value_vocab_size: int) -> PairCounts:
    """Sum several tables.

    Args:
        parts: any number of tables.
        value_vocab_size: number of ids of the value network's tokenizer.

    Returns:
        Each pair of any part once, with the sum of its amounts.
    """
    empty = PairCounts(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    columns = [np.concatenate(column) for column in zip(empty, *parts, strict=True)]
    return count_pairs(columns[0], columns[1], columns[2], value_vocab_size=value_vocab_size)


def best_per_base_token(
    counts: PairCounts, scores: np.ndarray, *, base_vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each base token's highest score; ties go to the lowest value id.

    Args:
        counts: the pairs.
        scores: [P] float64, one per pair, not negative.
        base_vocab_size: number of ids of the base's tokenizer.

    Returns:
        value_index [Vb] int32 and score [Vb] float64; index 0 and score 0 for base tokens without
        a pair of positive score.
    """
    order = np.lexsort((counts.value_ids, -scores, counts.base_ids))
    base_ids, first = np.unique(counts.base_ids[order], return_index=True)
    chosen = order[first]
    positive = scores[chosen] > 0
    index = np.zeros(base_vocab_size, np.int32)
    best = np.zeros(base_vocab_size, np.float64)
    index[base_ids[positive]] = counts.value_ids[chosen][positive]
    best[base_ids[positive]] = scores[chosen][positive]
    return index, best


def largest_per_base_token(
    counts: PairCounts, *, base_vocab_size: int, entries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each base token's largest amounts; ties go to the lowest value ids.

    Args:
        counts: the pairs.
        base_vocab_size: number of ids of the base's tokenizer.
        entries: the most pairs to keep per base token, K.

    Returns:
        value_index [Vb K] int32 and amount [Vb K] float64, descending along a row; index 0 and
        amount 0 in unused entries.
    """
    order = np.lexsort((counts.value_ids, -counts.amounts, counts.base_ids))
    base_ids = counts.base_ids[order]
    rank = np.arange(len(order)) - np.searchsorted(base_ids, base_ids, side="left")
    kept = rank < entries
    index = np.zeros((base_vocab_size, entries), np.int32)
    amount = np.zeros((base_vocab_size, entries), np.float64)
    index[base_ids[kept], rank[kept]] = counts.value_ids[order][kept]
    amount[base_ids[kept], rank[kept]] = counts.amounts[order][kept]
    return index, amount
