"""A vocabulary map from byte offsets: pairs tokens that begin at the same byte.

In: texts tokenised by both tokenizers, the bytes of the tokens. Out: the best value token of each
base token with its weight, or the best few. Linear in the text; no edit distance, no word marks.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ivl_jax.vocabulary.pair_counts import (
    PairCounts,
    best_per_base_token,
    count_pairs,
    largest_per_base_token,
    merge_counts,
)

TokenBytes = Sequence[bytes | None]
# Texts are counted in chunks of about this many tokens: 30 MB of working arrays.
_TOKENS_AT_ONCE = 500_000


class ByteCounts(NamedTuple):
    """The counts from alignment by byte offsets."""

    pairs: PairCounts
    """Per pair of tokens that begin at the same byte, the summed share of common bytes."""
    aligned: np.ndarray
    """[Vb] float64, how often a base token began where a value token begins."""
    unequal: tuple[int, ...]
    """Texts that the two tokenizers do not decode to the same bytes; they are left out."""


class Partners(NamedTuple):
    """A text's base tokens that have bytes in it, each with the value token that begins there."""

    text: bytes
    """The text."""
    base_ids: np.ndarray
    """[N] ids of the base."""
    start: np.ndarray
    """[N] int64, the byte at which the token begins."""
    end: np.ndarray
    """[N] int64, the byte at which it ends."""
    value_ids: np.ndarray
    """[N] int64, the value token that begins at the same byte; −1 if there is none."""


class _Spans(NamedTuple):
    """Tokens of many texts on one common byte axis, without tokens that have no bytes there."""

    ids: np.ndarray
    """[N] token ids."""
    start: np.ndarray
    """[N] int64, where the token begins."""
    end: np.ndarray
    """[N] int64, where it ends."""
    length: np.ndarray
    """[N] int64, bytes of the token itself; the space before a text is not on the axis."""


def count_same_starts(
    value_rows: Sequence[np.ndarray],
    base_rows: Sequence[np.ndarray],
    *,
    value_bytes: TokenBytes,
    base_bytes: TokenBytes,
) -> ByteCounts:
    """Find the tokens that begin at the same byte of the same text.

    A base token predicted at some byte competes with the value network's prediction at that byte,
    so only a value token that begins there can be its counterpart. The share in common is the
    shorter token's bytes over the longer one's: 1 if they are the same.

    Args:
        value_rows: per text, the value network's token ids.
        base_rows: per text, the base's.
        value_bytes: by id, the bytes of each ordinary token; None for special ones, which occupy
            no bytes of the text.
        base_bytes: the same for the base.

    Returns:
        The sums of shares, the number of aligned occurrences, and the texts left out: those whose
        bytes differ by more than the one space that SentencePiece puts before a text.
    """
    lengths = [np.array([len(b or b"") for b in table]) for table in (value_bytes, base_bytes)]
    parts, aligned, unequal = [], np.zeros(len(base_bytes)), []
    for chunk in _chunks(base_rows):
        prefixes = [
            _prefixes(_spelled(value_rows[row], value_bytes), _spelled(base_rows[row], base_bytes))
            for row in chunk
        ]
        unequal += [row for row, both in zip(chunk, prefixes, strict=True) if both is None]
        kept = [(row, both) for row, both in zip(chunk, prefixes, strict=True) if both is not None]
        if not kept:
            continue
        value, base = (
            _spans([rows[row] for row, _ in kept], table, np.array([both[k] for _, both in kept]))
            for k, (rows, table) in enumerate(zip((value_rows, base_rows), lengths, strict=True))
        )
        token_at = np.full(int(base.end.max(initial=0)) + 1, -1, np.int64)
        token_at[value.start] = np.arange(len(value.ids))
        partner = token_at[base.start]
        met = partner >= 0
        theirs = partner[met]
        common = np.minimum(base.end[met], value.end[theirs]) - base.start[met]
        share = common / np.maximum(base.length[met], value.length[theirs])
        size = len(value_bytes)
        parts.append(count_pairs(base.ids[met], value.ids[theirs], share, value_vocab_size=size))
        aligned += np.bincount(base.ids[met], minlength=len(base_bytes))
    return ByteCounts(
        merge_counts(parts, value_vocab_size=len(value_bytes)), aligned, tuple(unequal)
    )


def partners(
    value_row: np.ndarray,
    base_row: np.ndarray,
    *,
    value_bytes: TokenBytes,
    base_bytes: TokenBytes,
) -> Partners | None:
    """Find the value token that begins where each base token of one text begins.

    Args:
        value_row: the text in the value network's token ids.
        base_row: in the base's.
        value_bytes: by id, the bytes of each ordinary token; None for special ones.
        base_bytes: the same for the base.

    Returns:
        The base's tokens, without those that have no bytes in the text; None if the two tokenizers
        do not decode to the same bytes.
    """
    spelled = _spelled(value_row, value_bytes), _spelled(base_row, base_bytes)
    both = _prefixes(*spelled)
    if both is None:
        return None
    text = spelled[1][both[1] :]
    value, base = (
        _spans([row], np.array([len(b or b"") for b in table]), np.array([prefix]))
        for row, table, prefix in zip(
            (value_row, base_row), (value_bytes, base_bytes), both, strict=True
        )
    )
    value_at = np.full(len(text) + 1, -1, np.int64)
    value_at[value.start] = value.ids
    return Partners(text, base.ids, base.start, base.end, value_at[base.start])


def weigh_same_starts(
    counts: ByteCounts, *, value_bytes: TokenBytes, base_bytes: TokenBytes
) -> tuple[np.ndarray, np.ndarray]:
    """Each base token's best value token, and how reliable it is.

    A base token with the same bytes as a value token counts as aligned with it once. So tokens that
    never occur in the text are mapped by their bytes, and the text overrides that where it shows
    otherwise (for example SentencePiece's lone ▁ before digits).

    Args:
        counts: from `count_same_starts`.
        value_bytes: by id, the bytes of each ordinary token.
        base_bytes: likewise.

    Returns:
        value_index [Vb] int32: the value token with the largest sum of shares, the lowest id on a
        tie; weight [Vb] float32: that sum divided by the number of aligned occurrences, so 1 if the
        bytes are always the same. 0 and 0 if there is neither evidence nor a token of equal bytes.
    """
    pairs, once = _with_equal_bytes(counts, value_bytes=value_bytes, base_bytes=base_bytes)
    index, score = best_per_base_token(pairs, pairs.amounts, base_vocab_size=len(base_bytes))
    met = counts.aligned + np.bincount(once.base_ids, minlength=len(base_bytes))
    return index, (score / np.maximum(met, 1)).astype(np.float32)


def project_same_starts(
    counts: ByteCounts, *, value_bytes: TokenBytes, base_bytes: TokenBytes, entries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each base token's few best value tokens, as a distribution over them.

    A constant added to all value logits is then added to every mapped token as it is, whereas a
    single entry with a weight below 1 passes on only part of it. A token of equal bytes counts
    once more, as in `weigh_same_starts`.

    Args:
        counts: from `count_same_starts`.
        value_bytes: by id, the bytes of each ordinary token.
        base_bytes: likewise.
        entries: the most value tokens per base token, K.

    Returns:
        value_index [Vb K] int32 and weight [Vb K] float32: a row's weights are in the proportion of
        its sums of shares and sum to 1. 0 and 0 in unused entries.
    """
    pairs, _ = _with_equal_bytes(counts, value_bytes=value_bytes, base_bytes=base_bytes)
    index, amount = largest_per_base_token(pairs, base_vocab_size=len(base_bytes), entries=entries)
    total = amount.sum(axis=1, keepdims=True)
    return index, (amount / np.where(total > 0, total, 1)).astype(np.float32)


def _with_equal_bytes(
    counts: ByteCounts, *, value_bytes: TokenBytes, base_bytes: TokenBytes
) -> tuple[PairCounts, PairCounts]:
    """The counts with each pair of equal bytes counted once more; and these pairs alone."""
    size = len(value_bytes)
    base_ids, value_ids = _equal_bytes(value_bytes=value_bytes, base_bytes=base_bytes)
    once = count_pairs(base_ids, value_ids, np.ones(len(base_ids)), value_vocab_size=size)
    return merge_counts([counts.pairs, once], value_vocab_size=size), once


def _chunks(rows: Sequence[np.ndarray]) -> list[list[int]]:
    """Consecutive texts, about `_TOKENS_AT_ONCE` tokens together."""
    ends = np.cumsum([len(row) for row in rows])
    chunk_of = ends // _TOKENS_AT_ONCE
    return [np.flatnonzero(chunk_of == chunk).tolist() for chunk in np.unique(chunk_of)]


def _spelled(row: np.ndarray, table: TokenBytes) -> bytes:
    return b"".join([table[token] or b"" for token in row.tolist()])


def _prefixes(value_text: bytes, base_text: bytes) -> tuple[int, int] | None:
    """Bytes that each tokenizer puts before the common text, one space at most; None if unequal."""
    if value_text == base_text:
        return 0, 0
    if base_text == b" " + value_text:
        return 0, 1
    if value_text == b" " + base_text:
        return 1, 0
    return None


def _spans(rows: Sequence[np.ndarray], lengths: np.ndarray, prefixes: np.ndarray) -> _Spans:
    """Place tokens on the common byte axis, one text after the other."""
    ids = np.concatenate(rows)
    length = lengths[ids]
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    text_bytes = np.bincount(row_of, weights=length, minlength=len(rows)).astype(np.int64)
    text_start = np.cumsum(text_bytes - prefixes) - (text_bytes - prefixes)
    # Bytes before each text that are not on the axis: all prefixes up to and including its own.
    end = np.cumsum(length) - np.cumsum(prefixes)[row_of]
    start = np.maximum(end - length, text_start[row_of])
    kept = end > start
    return _Spans(ids[kept], start[kept], end[kept], length[kept])


def _equal_bytes(
    *, value_bytes: TokenBytes, base_bytes: TokenBytes
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of tokens with the same bytes, each base token at most once.

    Some bytes have two tokens (`A` and `<0x41>`): the last ones are paired first, then those
    before.
    """
    by_bytes: list[dict[bytes, list[int]]] = []
    for table in (value_bytes, base_bytes):
        ids = defaultdict(list)
        for token_id, spelled in enumerate(table):
            if spelled:
                ids[spelled].append(token_id)
        by_bytes.append(ids)
    pairs = [
        (base_id, value_ids[max(0, len(value_ids) - len(base_ids) + k)])
        for spelled, base_ids in by_bytes[1].items()
        if (value_ids := by_bytes[0].get(spelled))
        for k, base_id in enumerate(base_ids)
    ]
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]
