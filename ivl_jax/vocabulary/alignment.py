"""Builds a vocabulary map from running text tokenised by both tokenizers.

In: two tokenizers and texts. Out: the map, its metadata, and what it covers.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer
from ivl_jax.vocabulary.byte_offsets import (
    count_same_starts,
    project_same_starts,
    weigh_same_starts,
)
from ivl_jax.vocabulary.dtw import count_coaligned, normalise_counts, token_strings
from ivl_jax.vocabulary.mapping import MapMetadata, VocabularyMap, total_weights
from ivl_jax.vocabulary.special_tokens import SpecialPairs, pair_special_tokens

Method = Literal["dtw", "bytes", "projection"]
PROJECTION_ENTRIES = 4
"""Value tokens per base token of a projection, at most, unless another number is asked for."""
_TEXTS_PER_TOKENIZER_CALL = 256
_EXAMPLES = 12
# Stages of a build, as its progress callback counts them.
TOKENISE_BASE, TOKENISE_VALUE, ALIGN = range(3)


class NamedTokenizer(NamedTuple):
    """A tokenizer with what alignment needs to know about it."""

    name: str
    """What messages and the map's metadata call it."""
    tokenizer: Any
    """A transformers tokenizer."""
    info: TokenizerInfo
    """What identifies it, including the bytes of its tokens."""
    strings: Sequence[str]
    """By id, the token without its word-start mark."""


@dataclass(frozen=True)
class Coverage:
    """What a map covers.

    Attributes:
        tokens: Share of the base's ids that are mapped, 0 to 1.
        text: Share of the running text's base tokens (special ones excluded) that are mapped.
        mean_weight: Mean weight over the running text's base tokens, unmapped ones as 0.
        unmapped_in_text: (base id, times seen) of the most frequent unmapped tokens, descending.
        unmapped_elsewhere: Some unmapped base ids that the text never shows, spread over the
            vocabulary.
    """

    tokens: float
    text: float
    mean_weight: float
    unmapped_in_text: tuple[tuple[int, int], ...]
    unmapped_elsewhere: tuple[int, ...]


@dataclass(frozen=True)
class BuiltMap:
    """A map that was just built.

    Attributes:
        vocabulary_map: The map.
        metadata: What its file will record.
        coverage: What it covers.
        base_tokens: Base tokens in the running text.
        unequal_texts: Texts that `bytes` or `projection` left out, because the two tokenizers do
            not decode to the same bytes.
        tokenise_seconds: Seconds spent in the two tokenizers.
        align_seconds: Seconds spent after them.
    """

    vocabulary_map: VocabularyMap
    metadata: MapMetadata
    coverage: Coverage
    base_tokens: int
    unequal_texts: tuple[int, ...]
    tokenise_seconds: float
    align_seconds: float


class AlignmentError(ValueError):
    """Text on which two tokenizers cannot be aligned."""


def named_tokenizer(name: str, tokenizer: Any, folder: str) -> NamedTokenizer:
    """Identify a tokenizer.

    Args:
        name: what messages and the map's metadata call it.
        tokenizer: a transformers tokenizer with a fast backend.
        folder: its folder, whose `generation_config.json` may list further ends of text.

    Returns:
        The tokenizer with its info.

    Raises:
        ValueError: the bytes of its tokens cannot be determined.
    """
    info = describe_tokenizer(tokenizer, folder)
    return NamedTokenizer(name, tokenizer, info, token_strings(tokenizer, info.ordinary_tokens))


def build_vocabulary_map(
    base: NamedTokenizer,
    value: NamedTokenizer,
    texts: Sequence[str],
    *,
    method: Method,
    centred: bool = False,
    entries: int = PROJECTION_ENTRIES,
    pairs_by_hand: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda stage, texts: None,
) -> BuiltMap:
    """Build a vocabulary map from running text.

    Args:
        base: the base's tokenizer.
        value: the value network's tokenizer.
        texts: running text, each text aligned separately; not empty.
        method: `dtw`, the authors' dynamic time warping; `bytes`, alignment by byte offsets; or
            `projection`, the same with several value tokens per base token.
        centred: recorded in the metadata: whether value logits should be centred when mapped.
        entries: value tokens per base token, at most; `projection` only.
        pairs_by_hand: special tokens to pair, each `BASE_TOKEN=VALUE_TOKEN`; overrides the roles.
        progress: called with a stage (`TOKENISE_BASE`, `TOKENISE_VALUE`, `ALIGN`) and the number of
            texts just done in it.

    Returns:
        The map; special tokens are paired by role with weight 1, the other entries come from the
        text.

    Raises:
        AlignmentError: no texts; or (but for `dtw`) no text that both tokenizers decode to the same
            bytes.
        ValueError: a pair by hand does not name special tokens.

    Source:
        arXiv 2410.21027 for `dtw`; the others are ours.
    """
    if not texts:
        raise AlignmentError("no texts to align; provide the kind of text that the models read")
    special = pair_special_tokens(
        base.info, value.info, base_name=base.name, value_name=value.name, by_hand=pairs_by_hand
    )
    started = time.perf_counter()
    base_rows, value_rows = (
        tokenise(named.tokenizer, texts, lambda done, stage=stage: progress(stage, done))
        for stage, named in ((TOKENISE_BASE, base), (TOKENISE_VALUE, value))
    )
    tokenise_seconds = time.perf_counter() - started
    built = build_from_rows(
        base,
        value,
        base_rows,
        value_rows,
        method=method,
        special_pairs=special,
        centred=centred,
        entries=entries,
        progress=lambda done: progress(ALIGN, done),
    )
    return dataclasses.replace(built, tokenise_seconds=tokenise_seconds)


def build_from_rows(
    base: NamedTokenizer,
    value: NamedTokenizer,
    base_rows: list[np.ndarray],
    value_rows: list[np.ndarray],
    *,
    method: Method,
    special_pairs: SpecialPairs,
    centred: bool = False,
    entries: int = PROJECTION_ENTRIES,
    progress: Callable[[int], None] = lambda texts: None,
) -> BuiltMap:
    """Build a vocabulary map from texts that are already tokenised.

    Args:
        base: the base's tokenizer.
        value: the value network's tokenizer.
        base_rows: per text, the base's ids, as `tokenise` gives them; at least one text.
        value_rows: the same texts in the value network's ids.
        method: `dtw`, `bytes` or `projection`.
        special_pairs: (role, base id, value id), from `pair_special_tokens`.
        centred: recorded in the metadata.
        entries: value tokens per base token, at most; `projection` only.
        progress: called with the number of texts just aligned.

    Returns:
        The map; `tokenise_seconds` is 0.

    Raises:
        AlignmentError: (but for `dtw`) no text that both tokenizers decode to the same bytes.
    """
    started = time.perf_counter()
    unequal: tuple[int, ...] = ()
    if method == "dtw":
        index, weight = _by_dtw(base, value, base_rows, value_rows, progress)
    else:
        projected = entries if method == "projection" else None
        index, weight, unequal = _by_bytes(base, value, base_rows, value_rows, projected)
        progress(len(base_rows))
    index_rows, weight_rows = (array.reshape(len(array), -1) for array in (index, weight))
    for _, base_id, value_id in special_pairs:
        index_rows[base_id], weight_rows[base_id] = 0, 0.0
        index_rows[base_id, 0], weight_rows[base_id, 0] = value_id, 1.0
    align_seconds = time.perf_counter() - started
    vocabulary_map = VocabularyMap(jnp.asarray(index), jnp.asarray(weight))
    coverage = _coverage(total_weights(vocabulary_map), base_rows, base.info)
    metadata = MapMetadata(
        method=method,
        base_name=base.name,
        base_fingerprint=base.info.fingerprint,
        value_name=value.name,
        value_fingerprint=value.info.fingerprint,
        value_vocab_size=value.info.vocab_size,
        centred=centred,
        token_coverage=coverage.tokens,
        text_coverage=coverage.text,
        texts=len(base_rows),
        special_pairs=special_pairs,
    )
    return BuiltMap(
        vocabulary_map=vocabulary_map,
        metadata=metadata,
        coverage=coverage,
        base_tokens=sum(map(len, base_rows)),
        unequal_texts=unequal,
        tokenise_seconds=0.0,
        align_seconds=align_seconds,
    )


def tokenise(
    tokenizer: Any, texts: Sequence[str], progress: Callable[[int], None] = lambda texts: None
) -> list[np.ndarray]:
    """Tokenise texts, including the special tokens that the tokenizer adds.

    Args:
        tokenizer: a transformers tokenizer.
        texts: any number of texts.
        progress: called with the number of texts just done.

    Returns:
        Per text, [N] int32 ids.
    """
    rows = []
    for start in range(0, len(texts), _TEXTS_PER_TOKENIZER_CALL):
        batch = list(texts[start : start + _TEXTS_PER_TOKENIZER_CALL])
        ids = tokenizer(batch, add_special_tokens=True, verbose=False)["input_ids"]
        rows += [np.array(row, np.int32) for row in ids]
        progress(len(batch))
    return rows


def _by_dtw(
    base: NamedTokenizer,
    value: NamedTokenizer,
    base_rows: list[np.ndarray],
    value_rows: list[np.ndarray],
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    counts = count_coaligned(
        value_rows,
        base_rows,
        value_strings=value.strings,
        base_strings=base.strings,
        progress=progress,
    )
    return normalise_counts(
        counts, base_vocab_size=base.info.vocab_size, value_vocab_size=value.info.vocab_size
    )


def _by_bytes(
    base: NamedTokenizer,
    value: NamedTokenizer,
    base_rows: list[np.ndarray],
    value_rows: list[np.ndarray],
    entries: int | None,
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """One value token per base token, or (`entries`) several."""
    tables = {
        "value_bytes": value.info.ordinary_tokens,
        "base_bytes": base.info.ordinary_tokens,
    }
    counts = count_same_starts(value_rows, base_rows, **tables)
    if len(counts.unequal) == len(base_rows):
        raise AlignmentError(
            f"{base.name} and {value.name} do not decode to the same bytes for any of the "
            f"{len(base_rows)} texts (one of them normalises the text before splitting it); "
            "use --method dtw"
        )
    if entries is not None:
        return *project_same_starts(counts, **tables, entries=entries), counts.unequal
    return *weigh_same_starts(counts, **tables), counts.unequal


def _coverage(weight: np.ndarray, base_rows: list[np.ndarray], info: TokenizerInfo) -> Coverage:
    seen = np.bincount(np.concatenate(base_rows), minlength=info.vocab_size)
    seen[list(info.special_tokens)] = 0
    mapped = weight > 0
    total = max(int(seen.sum()), 1)
    frequent = np.argsort(-np.where(mapped, 0, seen), kind="stable")[:_EXAMPLES]
    known = np.array([spelled is not None for spelled in info.ordinary_tokens], bool)
    elsewhere = np.flatnonzero(known & ~mapped & (seen == 0))
    spread = np.linspace(0, len(elsewhere) - 1, min(_EXAMPLES, len(elsewhere))).astype(int)
    return Coverage(
        tokens=float(mapped.mean()),
        text=float(seen[mapped].sum() / total),
        mean_weight=float((seen * weight).sum() / total),
        unmapped_in_text=tuple(
            (int(i), int(seen[i])) for i in frequent if seen[i] and not mapped[i]
        ),
        unmapped_elsewhere=tuple(elsewhere[spread].tolist()),
    )
