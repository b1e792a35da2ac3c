"""Reads the rows of demonstrations as dialogues, and decides which are held out.

In: files or TFDS datasets, the format of their rows, and how to hold out a validation split. Out:
the dialogues of each split in order; and, from a first pass over all rows, their number, malformed
rows and repetitions.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ivl_jax.data.formats import (
    Demonstration,
    ParsedRow,
    RowError,
    RowFormat,
    check_templates,
    fill_template,
    find_format,
    parse_row,
)
from ivl_jax.data.sources import read_rows

_HASH_SPACE = 1 << 64
_KEPT_AT_MOST = 1000  # malformed rows that are remembered
_LISTED_AT_MOST = 20  # reasons that a message lists


@dataclass(frozen=True)
class DemonstrationSource:
    """Where demonstrations come from and how their rows are read.

    Attributes:
        train: JSON or JSONL files, or `tfds:NAME[/CONFIG][:SPLIT]`.
        validation: The same for held-out rows; when empty, `validation_fraction` of `train`.
        test: The same for a third split; may stay empty.
        row_format: How a row is written: a key of `ivl_jax.data.formats.FORMATS`, or
            `module:attribute` that the user's own config or flag names.
        templates: Role to template, for a format that reads them.
        validation_fraction: Share of the rows of `train` to hold out, by a hash of each dialogue,
            of a preference its prompt, so that equal ones stay together; at least one row is held
            out. 0 holds out none.
        group_field: A row's field, `module` or `meta.entity`; rows with equal values stay in the
            same split. Empty: every dialogue is split separately.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    row_format: str = "messages"
    templates: Mapping[str, str] = field(default_factory=dict)
    validation_fraction: float = 0.02
    group_field: str = ""

    def __post_init__(self) -> None:
        """Checks that the fields belong together."""
        check_templates(self.format, self.templates)
        if not self.train:
            raise ValueError("demonstrations: no training source")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: expected a share in [0, 1), got {self.validation_fraction}"
            )

    @property
    def format(self) -> RowFormat:
        """How a row is written."""
        return find_format(self.row_format)

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The non-empty sources by split."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: tuple(files) for split, files in splits.items() if files}

    @property
    def held_out_share(self) -> float:
        """The share of `train` that is held out; 0 if `validation` has its own sources."""
        return 0.0 if self.validation else self.validation_fraction


class MalformedRow(NamedTuple):
    """A row that is not a dialogue."""

    place: str  # "train.jsonl:17", file and line
    reason: str


def list_malformed(malformed: Sequence[MalformedRow], count: int) -> str:
    """Lists malformed rows for a message, one line for each of at most twenty reasons.

    Args:
        malformed: The first malformed rows.
        count: Their total number.

    Example:
        >>> rows = [MalformedRow("a.jsonl:1", "is empty"), MalformedRow("a.jsonl:3", "is empty")]
        >>> print("malformed:" + list_malformed(rows, 5))
        malformed:
          a.jsonl:1: is empty (and 1 more like it)
          and 3 more
    """
    places: dict[str, list[str]] = {}
    for place, reason in malformed:
        places.setdefault(reason, []).append(place)
    lines = []
    for reason, (first, *others) in itertools.islice(places.items(), _LISTED_AT_MOST):
        count -= 1 + len(others)
        same = f" (and {len(others)} more like it)" if others else ""
        lines.append(f"\n  {first}: {reason}{same}")
    return "".join(lines) + (f"\n  and {count} more" if count else "")


class Survey(NamedTuple):
    """The results of a first pass over the rows."""

    counts: dict[str, int]  # demonstrations of each split that has any
    cutoff: int  # rows of the training source whose hash is below it are held out
    malformed: tuple[MalformedRow, ...]  # the first thousand
    malformed_count: int
    trimmed_count: int  # dialogues from which turns without a use in training were left out
    unweighted_count: int  # turns of weight 0
    repeated_count: int  # training rows whose dialogue repeats an earlier row's
    leaked_counts: dict[str, int]  # dialogues of held-out files that are also in the training rows


class _ReadRow(NamedTuple):
    """A row of a source, read."""

    demonstration: Demonstration
    trimmed: bool
    dialogue_hash: int  # of the dialogue's text, in [0, 2^64)
    split_hash: int  # of what decides its split: the dialogue, or its group


def survey_rows(source: DemonstrationSource) -> Survey:
    """Reads every row once.

    Raises:
        SourceError: A file or a dataset is missing or cannot be read at all.
    """
    dialogues = {split: array("Q") for split in source.files}
    train_hashes = array("Q")
    malformed: list[MalformedRow] = []
    malformed_count = trimmed_count = unweighted_count = 0
    for split in source.files:
        for row in _read(source, split):
            if isinstance(row, MalformedRow):
                malformed_count += 1
                malformed += [row] * (len(malformed) < _KEPT_AT_MOST)
                continue
            trimmed_count += row.trimmed
            unweighted_count += sum(not turn.weight for turn in row.demonstration.messages)
            dialogues[split].append(row.dialogue_hash)
            if split == "train":
                train_hashes.append(row.split_hash)
    cutoff = 0
    if source.held_out_share and train_hashes:
        # If all of a few rows are above the cutoff, the one with the lowest hash is held out.
        cutoff = max(round(source.held_out_share * _HASH_SPACE), min(train_hashes) + 1)
    counts = {split: len(found) for split, found in dialogues.items()}
    if cutoff:
        counts["validation"] = sum(value < cutoff for value in train_hashes)
        counts["train"] -= counts["validation"]
    distinct = np.unique(np.asarray(dialogues["train"], np.uint64))
    leaked = {
        split: int(np.isin(np.asarray(found, np.uint64), distinct).sum())
        for split, found in dialogues.items()
        if split != "train"
    }
    return Survey(
        counts={split: count for split, count in counts.items() if count},
        cutoff=cutoff,
        malformed=tuple(malformed),
        malformed_count=malformed_count,
        trimmed_count=trimmed_count,
        unweighted_count=unweighted_count,
        repeated_count=len(dialogues["train"]) - len(distinct),
        leaked_counts={split: count for split, count in leaked.items() if count},
    )


def read_split(source: DemonstrationSource, split: str, *, cutoff: int) -> Iterator[Demonstration]:
    """Reads the demonstrations of a split, including those held out from the training source.

    Args:
        source: Where they come from.
        split: `train`, `validation` or `test`.
        cutoff: From the survey.

    Yields:
        Every row that is a dialogue and belongs to the split, in order.
    """
    origin = "train" if split == "validation" and not source.validation else split
    for row in _read(source, origin):
        if isinstance(row, MalformedRow):
            continue
        held_out = origin == "train" and row.split_hash < cutoff
        if held_out == (split == "validation" and origin == "train"):
            yield row.demonstration


def _read(source: DemonstrationSource, split: str) -> Iterator[_ReadRow | MalformedRow]:
    """Every row of a split's files, as a demonstration or with the reason why it is not one."""
    group = "{" + source.group_field + "}" if source.group_field else ""
    row_format = source.format
    for reference in source.files[split]:
        for row in read_rows(reference):
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                parsed = parse_row(row.value, row_format=row_format, templates=source.templates)
                dialogue_hash = _hash(_said(parsed))
                key = fill_template(group, row.value) if group else None
            except RowError as error:
                yield MalformedRow(row.place, str(error))
                continue
            yield _ReadRow(
                Demonstration(parsed.messages, row.place, parsed.rejected),
                parsed.trimmed,
                dialogue_hash,
                _hash(_key(parsed)) if key is None else _hash(key),
            )


def _said(row: ParsedRow) -> str:
    """A row as text, without weights, which must not affect its split."""
    return json.dumps([row.messages, row.rejected] if row.rejected else row.messages)


def _key(row: ParsedRow) -> str:
    """What keeps rows in the same split: the whole dialogue; of a preference, its prompt."""
    return json.dumps(row.messages[:-1]) if row.rejected else _said(row)


def _hash(text: str) -> int:
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
