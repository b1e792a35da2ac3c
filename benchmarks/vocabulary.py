"""Building vocabulary maps: seconds, coverage and size, compared with a loop over cells.

In: the tokenizers and GSM8K under ../shared. Out: rows for both methods. Times exclude
tokenisation. The peer aligns the same tokens with one call of rapidfuzz per cell.
"""

import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from rapidfuzz.distance import Levenshtein

from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.setting import PROJECT_ROOT
from benchmarks.timing import Figures, time_in_turn, time_work
from ivl_jax.tokenizer import load_tokenizer
from ivl_jax.vocabulary.alignment import (
    PROJECTION_ENTRIES,
    BuiltMap,
    Method,
    NamedTokenizer,
    build_from_rows,
    named_tokenizer,
    tokenise,
)
from ivl_jax.vocabulary.mapping import save_vocabulary_map, total_weights
from ivl_jax.vocabulary.special_tokens import pair_special_tokens
from ivl_jax.vocabulary.texts import read_texts

ABOUT = "building vocabulary maps: time, coverage, size; the peer is a loop over cells"

SHARED = PROJECT_ROOT.parent / "shared"
TOKENIZERS = {
    "Llama-2": "tokenizers/llama2",
    "GPT-2": "tokenizers/gpt2",
    "stories260k": "models/stories260k",
}
BASE, VALUE = "Llama-2", "GPT-2"
PEER_TEXTS = 200
# A dense float32 matrix of these two would take 6,433 MB.
MOST_MEMORY = 1000


class _TokenizedTexts(NamedTuple):
    """A tokenizer with the texts in its ids."""

    tokenizer: NamedTokenizer
    train: list[np.ndarray]
    """The texts that maps are counted on."""
    held_out: np.ndarray
    """Ordinary tokens of other texts, one after the other."""


def run(options: Options) -> Report:
    """Time the methods and the peer on one pair; then measure coverage for all pairs.

    Args:
        options: quick: 1,000 texts instead of 7,473, three repeats, the one pair.

    Returns:
        The report.

    Raises:
        FileNotFoundError: ../shared does not exist.
    """
    sides = {name: _tokenized(name, options) for name in TOKENIZERS}
    base, value = sides[BASE], sides[VALUE]
    rows = [*_speed_rows(base, value, repeats=3 if options.quick else 5)]
    for base_name, value_name in _pairs(options):
        for method in get_args(Method):
            rows += _coverage_rows(sides[base_name], sides[value_name], method)
    shapes = {
        "texts": len(base.train),
        "tokens": {name: sum(map(len, side.train)) for name, side in sides.items()},
        "vocabulary": {name: side.tokenizer.info.vocab_size for name, side in sides.items()},
        "cells": _cells(base.train, value.train),
    }
    return Report(rows, dtype="float64 paths, float32 weights", shapes=shapes)


def cell_by_cell(
    base: NamedTokenizer,
    value: NamedTokenizer,
    base_rows: list[np.ndarray],
    value_rows: list[np.ndarray],
) -> dict[tuple[int, int], int]:
    """The peer: dynamic time warping in Python with one rapidfuzz call per cell; counts pairs."""
    distance, infinite = Levenshtein.distance, float("inf")
    counts: dict[tuple[int, int], int] = {}
    for base_row, value_row in zip(base_rows, value_rows, strict=True):
        base_ids, value_ids = base_row.tolist(), value_row.tolist()
        bases = [base.strings[token] for token in base_ids]
        above = [0.0] + [infinite] * len(bases)
        table = [above]
        for token in value_ids:
            a = value.strings[token]
            here = [infinite]
            for j, b in enumerate(bases):
                cost = distance(a, b)
                if a in b or b in a:
                    cost *= 0.1
                here.append(cost + min(above[j], above[j + 1], here[j]))
            table.append(here)
            above = here
        i, j = len(value_ids), len(bases)
        while i > 0:
            pair = base_ids[j - 1], value_ids[i - 1]
            counts[pair] = counts.get(pair, 0) + 1
            corner, up, left = table[i - 1][j - 1], table[i - 1][j], table[i][j - 1]
            if corner <= up and corner <= left:
                i, j = i - 1, j - 1
            elif up <= left:
                i -= 1
            else:
                j -= 1
    return counts


def _speed_rows(base: _TokenizedTexts, value: _TokenizedTexts, *, repeats: int) -> Iterator[Row]:
    """Seconds of each method and of the peer, measured alternately; file size and memory."""
    few = base.train[:PEER_TEXTS], value.train[:PEER_TEXTS]
    builds = {method: _build(base, value, method) for method in get_args(Method)}
    times = time_in_turn(
        {
            **builds,
            "peer": lambda: bool(cell_by_cell(base.tokenizer, value.tokenizer, *few)),
        },
        repeats=repeats,
        warm_up=0,
    )
    scale = _cells(base.train, value.train) / _cells(*few)
    peer = Peer(
        f"loop over cells, {PEER_TEXTS} texts × {scale:.1f}", times["peer"].figures.median * scale
    )
    linear = Target("median", 6)
    targets = {"dtw": Target("ratio", 20), "bytes": linear, "projection": linear}
    for method, build in builds.items():
        what = f"{base.tokenizer.name} × {value.tokenizer.name}, {method}"
        size = Target("median", PROJECTION_ENTRIES if method == "projection" else 1)
        yield Row(
            f"{what}: {len(base.train):,} texts",
            times[method].figures,
            "s",
            peer=peer,
            target=targets[method],
        )
        yield Row(f"{what}: file", _counted(_file_size(build())), "MB", target=size)
        yield Row(
            f"{what}: peak memory above the texts'",
            _counted(_peak_memory(build)),
            "MB",
            target=Target("median", MOST_MEMORY),
        )


def _coverage_rows(base: _TokenizedTexts, value: _TokenizedTexts, method: Method) -> Iterator[Row]:
    """Seconds of one build, and what its map covers."""
    built: list[BuiltMap] = []
    build = _build(base, value, method)
    times = time_work(lambda: built.append(build()), repeats=1, warm_up=0)
    weight = total_weights(built[0].vocabulary_map)
    coverage = built[0].coverage
    what = f"{base.tokenizer.name} × {value.tokenizer.name}, {method}"
    yield Row(f"{what}: build", times.figures, "s")
    held_out = weight[base.held_out]
    for name, share in (
        ("base tokens mapped", coverage.tokens),
        ("running text mapped", coverage.text),
        ("other text mapped", float((held_out > 0).mean())),
        ("mean weight over other text", float(held_out.mean())),
    ):
        yield Row(f"{what}: {name}", _counted(100 * share), "%", better="higher")


def _tokenized(name: str, options: Options) -> _TokenizedTexts:
    folder = SHARED / TOKENIZERS[name]
    tokenizer = named_tokenizer(name, load_tokenizer(folder), str(folder))
    train, held_out = (
        read_texts([SHARED / "data/gsm8k" / file])[0] for file in ("train.jsonl", "test.jsonl")
    )
    ids = np.concatenate(tokenise(tokenizer.tokenizer, held_out))
    return _TokenizedTexts(
        tokenizer,
        tokenise(tokenizer.tokenizer, train[:1000] if options.quick else train),
        ids[~np.isin(ids, list(tokenizer.info.special_tokens))],
    )


def _pairs(options: Options) -> list[tuple[str, str]]:
    """Names of base and value."""
    if options.quick:
        return [(BASE, VALUE)]
    return [(base, value) for base in TOKENIZERS for value in TOKENIZERS if base != value]


def _build(base: _TokenizedTexts, value: _TokenizedTexts, method: Method) -> Callable[[], BuiltMap]:
    one, other = base.tokenizer, value.tokenizer
    special = pair_special_tokens(one.info, other.info, base_name=one.name, value_name=other.name)
    return lambda: build_from_rows(
        one, other, base.train, value.train, method=method, special_pairs=special
    )


def _cells(base_rows: list[np.ndarray], value_rows: list[np.ndarray]) -> int:
    return sum(len(base) * len(value) for base, value in zip(base_rows, value_rows, strict=True))


def _counted(figure: float) -> Figures:
    return Figures.of([figure])


def _file_size(built: BuiltMap) -> float:
    """Megabytes of the map's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map.safetensors"
        save_vocabulary_map(path, built.vocabulary_map, built.metadata)
        return path.stat().st_size / 1e6


def _peak_memory(build: Callable[[], BuiltMap]) -> float:
    """Peak megabytes of Python and NumPy while building, above those before."""
    tracemalloc.start()
    build()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6
