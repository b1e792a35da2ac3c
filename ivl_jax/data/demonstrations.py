"""Stores demonstrations of any format once, and detects sources that have changed.

In: files or TFDS datasets, the format of their rows, and how to hold out a validation split. Out:
the stored dataset, with random access by split, counts and the rows that could not be read.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from etils import epath

from ivl_jax.data.formats import FORMATS, Demonstration, Message, SourceError
from ivl_jax.data.reading import (
    DemonstrationSource,
    MalformedRow,
    Survey,
    list_malformed,
    read_split,
    survey_rows,
)
from ivl_jax.data.sealed_folders import open_sealed_folder
from ivl_jax.data.sources import hash_source, is_tfds
from ivl_jax.data.storage import DemonstrationSplit, dataset_folder, write_dataset
from ivl_jax.extensions import extension_hash
from ivl_jax.json_files import read_json_object, write_json
from ivl_jax.paths import usable_path
from ivl_jax.text_files import MalformedFileError

__all__ = [
    "Demonstration",
    "DemonstrationSource",
    "MalformedRow",
    "MalformedRowsError",
    "Message",
    "SettingNames",
    "StoredDemonstrations",
    "store_demonstrations",
]

_LOGGER = logging.getLogger(__name__)

_STORE_VERSION = 1  # of how rows become dialogues; a new number stores them again
_RECORD = "source.json"  # the sources of a stored dataset

_Hashes = Mapping[str, Sequence[tuple[str, str]]]  # split → source and SHA-256, in order


class MalformedRowsError(ValueError):
    """More rows than allowed are malformed."""


class SettingNames(NamedTuple):
    """What the user calls the settings of a source, for messages; those of training by default."""

    source: str = "data.train"
    row_format: str = "data.format"
    templates: str = "data.user_template and data.assistant_template"
    max_malformed: str = "data.max_malformed_fraction"
    max_length: str = "data.max_length"


TRAINING = SettingNames()


@dataclass(frozen=True)
class StoredDemonstrations:
    """A dataset stored on disk.

    Attributes:
        folder: The local folder that TFDS reads.
        fingerprint: SHA-256 over the source's content, the format and the split rule, and whether
            turns of weight 0 are marked, which earlier versions did not do.
        counts: Split to number of demonstrations.
        malformed: The first thousand rows that could not be read.
        malformed_count: Their total number.
        trimmed_count: Dialogues without their turns before the first user turn or after the last
            assistant turn, which were left out.
        unweighted_count: Turns of weight 0, which are left out of the loss.
        repeated_count: Rows of the training source whose dialogue repeats an earlier row's.
        leaked_counts: For each held-out split with its own sources, the dialogues that are also in
            the training source.
    """

    folder: epath.Path
    fingerprint: str
    counts: Mapping[str, int]
    malformed: tuple[MalformedRow, ...]
    malformed_count: int
    trimmed_count: int
    unweighted_count: int
    repeated_count: int
    leaked_counts: Mapping[str, int]

    @property
    def rows(self) -> int:
        """Number of rows of all sources, including those that could not be read."""
        return sum(self.counts.values()) + self.malformed_count

    @property
    def listed(self) -> str:
        """The first malformed rows, one line each."""
        return list_malformed(self.malformed, self.malformed_count)

    def open(self, split: str) -> DemonstrationSplit:
        """Opens a split for random access.

        Raises:
            KeyError: There is no such split.
        """
        if split not in self.counts:
            raise KeyError(f"{self.folder}: no split {split!r}; it has {sorted(self.counts)}")
        return DemonstrationSplit(self.folder, split, fingerprint=f"{self.fingerprint}/{split}")

    def log(self, names: SettingNames = TRAINING) -> None:
        """Logs what to know before using these rows."""
        if self.unweighted_count:
            _LOGGER.info("%d turns of weight 0 are left out of the loss", self.unweighted_count)
        for count, what in (
            (
                self.malformed_count,
                f"of {self.rows} rows are malformed and were left out:{self.listed}",
            ),
            (
                self.trimmed_count,
                "dialogues begin with an assistant's turn or end with a user's: those turns were "
                "left out",
            ),
            (
                self.repeated_count,
                f"rows of {names.source} repeat the dialogue of an earlier one, which then has "
                "more weight",
            ),
            *(
                (count, f"dialogues of data.{split} are also in data.train: they are not held out")
                for split, count in self.leaked_counts.items()
            ),
        ):
            if count:
                _LOGGER.warning("%d %s", count, what)


def store_demonstrations(
    source: DemonstrationSource,
    *,
    data_dir: epath.PathLike,
    max_malformed_share: float = 0.01,
    resuming: bool = False,
    names: SettingNames = TRAINING,
) -> StoredDemonstrations:
    """Stores demonstrations as a TFDS dataset in ArrayRecord form, unless already stored.

    The store is keyed by a fingerprint of the source's bytes, format and split rule. A source that
    has changed since it was stored is named in a warning and stored again; the old copy is kept for
    the runs that were trained on it.

    Args:
        source: Where the demonstrations come from.
        data_dir: Folder of all stored datasets; created if missing.
        max_malformed_share: Share of rows that may be malformed.
        resuming: Whether a run that started with these sources resumes; held-out data that is also
            trained on is then only a warning.
        names: What messages call the settings.

    Returns:
        The stored dataset.

    Raises:
        MalformedRowsError: More than `max_malformed_share` of the rows are malformed, or none is
            usable; lists places and reasons, and nothing is stored.
        SourceError: A file or a dataset is missing or cannot be read at all.
    """
    data_dir = usable_path(data_dir)
    hashes = {
        split: [(reference, hash_source(reference)) for reference in references]
        for split, references in source.files.items()
    }
    try:
        _check_held_out(hashes)
    except SourceError as error:
        if not resuming:
            raise
        _LOGGER.warning("%s", error)
    fingerprint = _fingerprint(source, hashes)
    stem = re.sub(r"[^A-Za-z0-9]+", "_", epath.Path(source.train[0]).stem).strip("_") or "data"
    name = f"{stem}-{fingerprint[:12]}"
    folder = dataset_folder(data_dir, name)

    def fill(temporary: epath.Path) -> Mapping[str, Any]:
        survey = survey_rows(source)
        record = _to_record(fingerprint, survey, source, hashes)
        _check_share(_from_record(record, folder), source, max_malformed_share, names)
        temporary.mkdir(parents=True)
        splits = {
            split: functools.partial(read_split, source, split, cutoff=survey.cutoff)
            for split in survey.counts
        }
        write_dataset(
            splits,
            folder=temporary / folder.name,
            rows=sum(survey.counts.values()),
            in_pairs=source.format.read_rejected is not None,
        )
        write_json(temporary / _RECORD, record)
        _LOGGER.info("demonstrations stored in %s: %s", folder, _counts_text(survey.counts))
        return record

    if not folder.parent.exists():
        _warn_of_changes(source, hashes, data_dir)
    what = f"the stored demonstrations of {source.train[0]}"
    sealed = open_sealed_folder(folder.parent, fill, what=what)
    stored = _from_record(sealed.record, sealed.path / folder.name)
    _check_share(stored, source, max_malformed_share, names)
    stored.log(names)
    return stored


def _check_held_out(hashes: _Hashes) -> None:
    """Raise an error if the held-out data is also trained on."""
    trained = {digest: reference for reference, digest in hashes["train"]}
    for split in ("validation", "test"):
        for reference, digest in hashes.get(split, ()):
            if digest in trained:
                same = "itself" if reference == trained[digest] else f"the same as {reference}"
                raise SourceError(
                    f"data.{split} is also trained on: data.train has {trained[digest]}, "
                    f"{same}, byte for byte; choose other rows, or leave data.validation empty and "
                    "set data.validation_fraction"
                )


def _check_share(
    stored: StoredDemonstrations,
    source: DemonstrationSource,
    max_malformed_share: float,
    names: SettingNames,
) -> None:
    """Raise an error if there are no rows, or too many are malformed."""
    if not stored.rows:
        have = "has" if len(source.train) == 1 else "have"
        raise MalformedRowsError(f"{names.source}: {', '.join(source.train)} {have} no rows")
    share = stored.malformed_count / stored.rows
    if share > max_malformed_share or not stored.counts.get("train"):
        raise MalformedRowsError(
            f"{names.source}: {stored.malformed_count} of {stored.rows} rows are malformed "
            f"({share:.1%}; at most {max_malformed_share:.1%} may be, and one row must remain):"
            f"{stored.listed or ' none'}\nthe rows were read as {names.row_format} "
            f"{source.row_format}: choose the format that they have (fields reads any, by "
            f"{names.templates}), fix the rows, or raise {names.max_malformed}"
        )


def _fingerprint(source: DemonstrationSource, hashes: _Hashes) -> str:
    """SHA-256 over content and reading rule; files count by name, not by folder."""
    identity = {
        "store": _STORE_VERSION,
        "rule": _rule(source),
        "content": {
            split: [(_base_name(reference), digest) for reference, digest in found]
            for split, found in hashes.items()
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _rule(source: DemonstrationSource) -> dict[str, Any]:
    """How rows are read and split, without their location."""
    rule = asdict(source)
    for split in ("train", "validation", "test"):
        del rule[split]
    rule["validation_fraction"] = source.held_out_share
    if source.row_format not in FORMATS:
        rule["format_source"] = extension_hash(source.row_format)
    return rule


def _base_name(reference: str) -> str:
    return reference if is_tfds(reference) else epath.Path(reference).name


def _warn_of_changes(source: DemonstrationSource, hashes: _Hashes, data_dir: epath.Path) -> None:
    """Names the files that have changed since the same source was last stored."""
    previous: dict[str, str] = {}
    stored_at = ""
    for path in (data_dir / "ivl_demonstrations").glob(f"*/{_RECORD}"):
        try:
            record = read_json_object(path)
            then = {
                split: [(str(reference), str(digest)) for reference, digest in found]
                for split, found in record["hashes"].items()
            }
            when = str(record["stored_at"])
            same_rule = record["rule"] == _rule(source)
        except (MalformedFileError, OSError, KeyError, TypeError, ValueError, AttributeError):
            _LOGGER.debug("%s is not a record of a stored dataset: ignored", path)
            continue
        if same_rule and _references(then) == _references(hashes) and when > stored_at:
            stored_at = when
            previous = {reference: digest for found in then.values() for reference, digest in found}
    for found in hashes.values():
        for reference, digest in found:
            if previous.get(reference, digest) != digest:
                _LOGGER.warning(
                    "%s has changed since it was stored on %s (SHA-256 %s then, %s now): it is "
                    "stored again; runs trained on the old rows cannot resume with the new ones",
                    reference,
                    stored_at,
                    previous[reference][:12],
                    digest[:12],
                )


def _references(hashes: _Hashes) -> dict[str, list[str]]:
    """The sources of each split, in order."""
    return {split: [reference for reference, _ in found] for split, found in hashes.items()}


def _to_record(
    fingerprint: str, survey: Survey, source: DemonstrationSource, hashes: _Hashes
) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint + ("/weights" if survey.unweighted_count else ""),
        "rule": _rule(source),
        "hashes": hashes,
        "counts": survey.counts,
        "malformed": survey.malformed,
        "malformed_count": survey.malformed_count,
        "trimmed_count": survey.trimmed_count,
        "unweighted_count": survey.unweighted_count,
        "repeated_count": survey.repeated_count,
        "leaked_counts": survey.leaked_counts,
        "stored_at": datetime.now(UTC).isoformat(timespec="microseconds"),
    }


def _from_record(record: Mapping[str, Any], folder: epath.Path) -> StoredDemonstrations:
    names = [field.name for field in fields(StoredDemonstrations) if field.name in record]
    malformed = tuple(MalformedRow(*row) for row in record["malformed"])
    values: dict[str, Any] = {name: record[name] for name in names} | {"malformed": malformed}
    return StoredDemonstrations(folder=folder, **values)


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())
