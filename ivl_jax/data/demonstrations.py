"""Stores demonstrations once, whatever form they come in, and notices a source that has changed.

In: files or TFDS sets, the format of their rows, and how to hold out a validation split. Out: the
stored dataset, read at random by split, with counts and the rows that could not be read.
"""

import hashlib
import json
import logging
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from etils import epath

from ivl_jax.data.formats import (
    Demonstration,
    Format,
    Message,
    RowError,
    check_templates,
    fill_template,
    parse_row,
)
from ivl_jax.data.sources import hash_source, is_tfds, read_rows
from ivl_jax.data.storage import DemonstrationSplit, dataset_folder, write_dataset

__all__ = [
    "Demonstration",
    "DemonstrationSource",
    "MalformedRow",
    "MalformedRowsError",
    "Message",
    "StoredDemonstrations",
    "store_demonstrations",
]

_LOGGER = logging.getLogger(__name__)

_STORE_VERSION = 1  # of what is stored; another number stores again
_HASH_SPACE = 1 << 64
_LISTED_AT_MOST = 20  # malformed rows that a message lists
_KEPT_AT_MOST = 1000  # malformed rows that source.json keeps


@dataclass(frozen=True)
class DemonstrationSource:
    """Where demonstrations come from and how their rows are read.

    Attributes:
        train: JSON or JSONL files, or `tfds:NAME[/CONFIG][:SPLIT]`.
        validation: The same for held-out rows; when empty, `validation_fraction` of `train`.
        test: The same for a third split; may stay empty.
        row_format: How a row is written; see `ivl_jax.data.formats.parse_row`.
        templates: Role to template, for the format `fields`.
        validation_fraction: Share of the rows of `train` to hold out, by a hash of each dialogue,
            so that equal dialogues stay together; at least one row is held out. 0 holds out none.
        group_field: A row's field, `module` or `meta.entity`; rows with equal values stay on one
            side. Empty: every dialogue for itself.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    row_format: Format = "messages"
    templates: Mapping[str, str] = field(default_factory=dict)
    validation_fraction: float = 0.02
    group_field: str = ""

    def __post_init__(self) -> None:
        """Checks that the fields belong together."""
        check_templates(self.row_format, self.templates)
        if not self.train:
            raise ValueError("demonstrations: no training source")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: expected a share in [0, 1), got {self.validation_fraction}"
            )

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The sources by split, those that are not empty."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: tuple(files) for split, files in splits.items() if files}

    @property
    def held_out_share(self) -> float:
        """The share of `train` that is held out; 0 when `validation` has sources of its own."""
        return 0.0 if self.validation else self.validation_fraction


class MalformedRow(NamedTuple):
    """A row that is not a dialogue."""

    place: str  # "train.jsonl:17", file and line
    reason: str


class MalformedRowsError(ValueError):
    """More rows than allowed are malformed."""


@dataclass(frozen=True)
class StoredDemonstrations:
    """A dataset as it lies on disk.

    Attributes:
        folder: What TFDS reads.
        fingerprint: SHA-256 over the source's content, the format and the split rule.
        counts: Split to number of demonstrations.
        malformed: The first thousand rows that could not be read.
        malformed_count: How many there are in all.
        trimmed_count: Dialogues of which turns before the first user's, or after the last
            assistant's, were left out.
    """

    folder: epath.Path
    fingerprint: str
    counts: Mapping[str, int]
    malformed: tuple[MalformedRow, ...]
    malformed_count: int
    trimmed_count: int

    def open(self, split: str) -> DemonstrationSplit:
        """Opens a split for random access.

        Raises:
            KeyError: There is no such split.
        """
        if split not in self.counts:
            raise KeyError(f"{self.folder}: no split {split!r}; there are {sorted(self.counts)}")
        return DemonstrationSplit(self.folder, split, fingerprint=f"{self.fingerprint}/{split}")


def store_demonstrations(
    source: DemonstrationSource, *, data_dir: epath.PathLike, max_malformed_share: float = 0.01
) -> StoredDemonstrations:
    """Stores demonstrations as a TFDS dataset in ArrayRecord form, or finds them stored.

    The store is keyed by a fingerprint of the source's bytes, format and split rule. A source that
    has changed since it was stored is named in a warning and stored again beside the old copy,
    which stays for the runs that were trained on it.

    Args:
        source: Where the demonstrations come from.
        data_dir: Folder of all stored datasets; created if absent.
        max_malformed_share: Share of rows that may be malformed.

    Returns:
        The stored dataset.

    Raises:
        MalformedRowsError: More than `max_malformed_share` of the rows are malformed, or none is
            usable; places and reasons are listed and nothing is stored.
        SourceError: A file or a set is absent or cannot be read at all.
    """
    data_dir = epath.Path(data_dir).expanduser()
    hashes = {
        split: {reference: hash_source(reference) for reference in references}
        for split, references in source.files.items()
    }
    fingerprint = _fingerprint(source, hashes)
    stem = re.sub(r"[^A-Za-z0-9]+", "_", epath.Path(source.train[0]).stem).strip("_") or "data"
    name = f"{stem}-{fingerprint[:12]}"
    folder = dataset_folder(data_dir, name)
    record_path = folder.parent / "source.json"
    if record_path.exists() and folder.exists():
        stored = _from_record(json.loads(record_path.read_text()), folder)
        _check_share(stored, max_malformed_share)
        return stored
    _warn_of_changes(source, hashes, data_dir)

    survey = _survey(source)
    stored = StoredDemonstrations(folder=folder, fingerprint=fingerprint, **survey.summary())
    _check_share(stored, max_malformed_share)
    splits = {
        split: lambda split=split: _demonstrations(source, survey.cutoff, split)
        for split in stored.counts
    }
    write_dataset(splits, data_dir=data_dir, name=name, rows=sum(stored.counts.values()))
    _write_json(record_path, _to_record(stored, source, hashes))
    _LOGGER.info("demonstrations stored in %s: %s", folder, _counts_text(stored.counts))
    return stored


class _Survey(NamedTuple):
    """What a first pass over the rows finds."""

    counts: dict[str, int]
    cutoff: int  # rows of the training source whose hash is below it are held out
    malformed: list[MalformedRow]
    malformed_count: int
    trimmed_count: int

    def summary(self) -> dict[str, Any]:
        """The fields that a stored dataset keeps."""
        return {
            "counts": self.counts,
            "malformed": tuple(self.malformed),
            "malformed_count": self.malformed_count,
            "trimmed_count": self.trimmed_count,
        }


class _ReadRow(NamedTuple):
    """A row of a source, read."""

    demonstration: Demonstration
    trimmed: bool
    split_hash: int  # in [0, 2^64)


def _read(source: DemonstrationSource, split: str) -> Iterator[_ReadRow | MalformedRow]:
    """Every row of a split's files, as a demonstration or with the reason why it is none."""
    group = "{" + source.group_field + "}" if source.group_field else ""
    for reference in source.files[split]:
        for row in read_rows(reference):
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                parsed = parse_row(
                    row.value, row_format=source.row_format, templates=source.templates
                )
                key = fill_template(group, row.value) if group else json.dumps(parsed.messages)
            except RowError as error:
                yield MalformedRow(row.place, str(error))
                continue
            digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
            demonstration = Demonstration(messages=parsed.messages, row_id=row.place)
            yield _ReadRow(demonstration, parsed.trimmed, int.from_bytes(digest[:8], "big"))


def _survey(source: DemonstrationSource) -> _Survey:
    """Reads every row once: how many there are, which are malformed, which are held out."""
    hashes = {split: array("Q") for split in source.files}
    malformed: list[MalformedRow] = []
    malformed_count = trimmed_count = 0
    for split in source.files:
        for row in _read(source, split):
            if isinstance(row, MalformedRow):
                malformed_count += 1
                malformed += [row] * (len(malformed) < _KEPT_AT_MOST)
            else:
                trimmed_count += row.trimmed
                hashes[split].append(row.split_hash)
    cutoff = 0
    if source.held_out_share and hashes["train"]:
        # Few rows may all lie above the share's cutoff: then the one with the lowest hash goes.
        cutoff = max(round(source.held_out_share * _HASH_SPACE), min(hashes["train"]) + 1)
    counts = {split: len(found) for split, found in hashes.items()}
    if cutoff:
        counts["validation"] = sum(value < cutoff for value in hashes["train"])
        counts["train"] -= counts["validation"]
    return _Survey(
        counts={split: count for split, count in counts.items() if count},
        cutoff=cutoff,
        malformed=malformed,
        malformed_count=malformed_count,
        trimmed_count=trimmed_count,
    )


def _demonstrations(
    source: DemonstrationSource, cutoff: int, split: str
) -> Iterator[Demonstration]:
    """The demonstrations of a split, held-out ones taken from the training source."""
    origin = "train" if split == "validation" and not source.validation else split
    for row in _read(source, origin):
        if isinstance(row, MalformedRow):
            continue
        held_out = origin == "train" and row.split_hash < cutoff
        if held_out == (split == "validation" and origin == "train"):
            yield row.demonstration


def _check_share(stored: StoredDemonstrations, max_malformed_share: float) -> None:
    """Says what is malformed or trimmed; an error when it is too much."""
    usable = sum(stored.counts.values())
    share = stored.malformed_count / max(1, usable + stored.malformed_count)
    listed = "".join(
        f"\n  {place}: {reason}" for place, reason in stored.malformed[:_LISTED_AT_MOST]
    )
    if stored.malformed_count > _LISTED_AT_MOST:
        listed += f"\n  and {stored.malformed_count - _LISTED_AT_MOST} more"
    total = usable + stored.malformed_count
    if share > max_malformed_share or not stored.counts.get("train"):
        raise MalformedRowsError(
            f"demonstrations: {stored.malformed_count} of {total} rows are malformed "
            f"({share:.1%}; at most {max_malformed_share:.1%} may be, and one training row must be "
            f"left):{listed or ' none'}\ncheck the format and its fields, mend the rows, or raise "
            "data.max_malformed_fraction"
        )
    if stored.malformed_count:
        _LOGGER.warning(
            "%d of %d rows are malformed and left out:%s", stored.malformed_count, total, listed
        )
    if stored.trimmed_count:
        _LOGGER.warning(
            "%d dialogues begin with an assistant's turn or end with a user's: those turns are "
            "left out",
            stored.trimmed_count,
        )


def _fingerprint(source: DemonstrationSource, hashes: Mapping[str, Mapping[str, str]]) -> str:
    """SHA-256 over content and reading rule; files count by name, wherever they lie."""
    identity = {
        "store": _STORE_VERSION,
        "rule": _rule(source),
        "content": {
            split: [[_base_name(reference), digest] for reference, digest in found.items()]
            for split, found in hashes.items()
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _rule(source: DemonstrationSource) -> dict[str, Any]:
    """How rows are read and split, without where they are."""
    rule = asdict(source)
    for split in ("train", "validation", "test"):
        del rule[split]
    rule["validation_fraction"] = source.held_out_share
    return rule


def _base_name(reference: str) -> str:
    return reference if is_tfds(reference) else epath.Path(reference).name


def _warn_of_changes(
    source: DemonstrationSource, hashes: Mapping[str, Mapping[str, str]], data_dir: epath.Path
) -> None:
    """Names the files that are not what they were when the same source was last stored."""
    previous: dict[str, Any] = {}
    for path in (data_dir / "ivl_demonstrations").glob("*/source.json"):
        record = json.loads(path.read_text())
        same = record["rule"] == _rule(source) and record["hashes"].keys() == hashes.keys()
        if same and all(record["hashes"][split].keys() == hashes[split].keys() for split in hashes):
            previous = max(previous, record, key=lambda found: found.get("stored_at", ""))
    for split, files in previous.get("hashes", {}).items():
        for reference, digest in files.items():
            if digest != hashes[split][reference]:
                _LOGGER.warning(
                    "%s has changed since it was stored on %s (SHA-256 %s then, %s now): it is "
                    "stored again; runs trained on the old rows cannot be resumed on the new ones",
                    reference,
                    previous["stored_at"],
                    digest[:12],
                    hashes[split][reference][:12],
                )


def _to_record(
    stored: StoredDemonstrations,
    source: DemonstrationSource,
    hashes: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    return {
        "fingerprint": stored.fingerprint,
        "rule": _rule(source),
        "hashes": hashes,
        "counts": stored.counts,
        "malformed": stored.malformed,
        "malformed_count": stored.malformed_count,
        "trimmed_count": stored.trimmed_count,
        "stored_at": datetime.now(UTC).isoformat(timespec="microseconds"),
    }


def _from_record(record: Mapping[str, Any], folder: epath.Path) -> StoredDemonstrations:
    return StoredDemonstrations(
        folder=folder,
        fingerprint=record["fingerprint"],
        counts=record["counts"],
        malformed=tuple(MalformedRow(*row) for row in record["malformed"]),
        malformed_count=record["malformed_count"],
        trimmed_count=record["trimmed_count"],
    )


def _write_json(path: epath.Path, record: Any) -> None:
    """Writes a file that is either whole or absent."""
    temporary = path.with_suffix(f".{datetime.now(UTC).timestamp()}.tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False))
    temporary.replace(path)


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())
