"""Tokenises a split of demonstrations once.

In: demonstrations and a chat format. Out: their tokens and loss masks in flat arrays, cached on
disk for the next run, with a report of what was truncated, dropped or could not be rendered.
"""

import contextlib
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import grain
import numpy as np
from etils import epath
from jaxtyping import Bool, Int32, Int64
from rich.console import Console
from rich.progress import track

from ivl_jax.data.chat import ChatFormat, ChatTemplateError, EncodedDialogue
from ivl_jax.data.demonstrations import (
    TRAINING,
    Demonstration,
    MalformedRow,
    MalformedRowsError,
    SettingNames,
)
from ivl_jax.data.reading import list_malformed
from ivl_jax.data.rendering import TemplateLimitError
from ivl_jax.data.sealed_folders import open_sealed_folder
from ivl_jax.data.segments import encode_segments
from ivl_jax.data.storage import DemonstrationSplit
from ivl_jax.paths import usable_path

_LOGGER = logging.getLogger(__name__)

_CACHE_VERSION = 1  # of how dialogues become tokens; a new number tokenises again
_CHUNK = 512  # dialogues encoded together
_BEYOND_LIMITS_AT_MOST = 3  # dialogues, each of which takes a second
_BAR_FROM_DIALOGUES = 10_000  # about five seconds of tokenising


@dataclass(frozen=True)
class TokenizationReport:
    """What happened to the dialogues of a split.

    Attributes:
        dialogues: Dialogues read.
        kept: Dialogues that have a target.
        tokens: Their tokens.
        targets: Their tokens that count in the loss.
        cut: Dialogues longer than the limit, which were truncated.
        dropped: Dialogues without an assistant's target within the limit, which were left out.
        equal_pairs: Preferences whose two answers have the same tokens, which were left out.
        special_texts: Dialogues whose messages contain a special token's text, such as `</s>` in
            HTML; it is read as that token.
        malformed: The first hundred dialogues that the chat template cannot render, and why.
        malformed_count: Their total number.
    """

    dialogues: int
    kept: int
    tokens: int
    targets: int
    cut: int
    dropped: int
    special_texts: int
    malformed: tuple[MalformedRow, ...]
    malformed_count: int
    equal_pairs: int = 0

    def log(self, sequence_length: int) -> None:
        """Logs what to know before using these dialogues."""
        _LOGGER.info(
            "%d dialogues tokenised: %d tokens, %d of them targets",
            self.kept,
            self.tokens,
            self.targets,
        )
        for count, what in (
            (self.cut, f"are longer than {sequence_length} tokens and were truncated"),
            (self.dropped, "have no assistant's token within the limit and were left out"),
            (
                self.equal_pairs,
                "are pairs whose answers have the same tokens, as rendered and truncated, and were "
                "left out",
            ),
            (
                self.special_texts,
                "contain a special token's text in a message; it is read as the token",
            ),
        ):
            if count:
                _LOGGER.warning("%d of %d dialogues %s", count, self.dialogues, what)
        if self.malformed_count:
            _LOGGER.warning(
                "%d of %d dialogues cannot be rendered and were left out:%s",
                self.malformed_count,
                self.dialogues,
                list_malformed(self.malformed, self.malformed_count),
            )


@dataclass(frozen=True)
class TokenizedDemonstrations(Sequence[EncodedDialogue]):
    """The tokenised dialogues of a split, end to end in flat arrays.

    Attributes:
        tokens: All tokens, `[M]`.
        loss_mask: Which of them the assistant must produce, `[M]`.
        starts: Where each dialogue begins, and the end of the last, `[N + 1]`.
        rows: Each dialogue's index in `demonstrations`, `[N]`.
        middles: Of preferences, where each rejected dialogue begins, `[N]`: the chosen one goes
            before it. None: every demonstration is one dialogue.
        demonstrations: Where the dialogues came from.
        sequence_length: Tokens that fit in a batch row; no dialogue is longer by more than one.
        fingerprint: Identifies demonstrations, chat format, tokenizer and limit, and whether pairs
            of equal answers were left out.
        report: What was truncated, dropped or malformed.
    """

    tokens: Int32[np.ndarray, "M"]
    loss_mask: Bool[np.ndarray, "M"]
    starts: Int64[np.ndarray, "N1"]
    rows: Int64[np.ndarray, "N"]
    middles: Int64[np.ndarray, "N"] | None
    demonstrations: Sequence[Demonstration]
    sequence_length: int
    fingerprint: str
    report: TokenizationReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Returns one dialogue, or a pair end to end; see `segments`."""
        if not 0 <= index < len(self):
            raise IndexError(f"dialogue {index} of {len(self)}")
        start, end = self.starts[index], self.starts[index + 1]
        return EncodedDialogue(
            np.asarray(self.tokens[start:end]), np.asarray(self.loss_mask[start:end])
        )

    def segments(self, indices: Iterable[int]) -> list[EncodedDialogue]:
        """Returns dialogues as segments of a row, of each pair two: the chosen, the rejected."""
        found = []
        for index in indices:
            tokens, loss_mask = self[index]
            middle = self.middles[index] - self.starts[index] if self.middles is not None else 0
            parts = (slice(0, middle), slice(middle, None)) if middle else (slice(None),)
            found += [EncodedDialogue(tokens[part], loss_mask[part]) for part in parts]
        return found

    @property
    def lengths(self) -> Int64[np.ndarray, "N"]:
        """Tokens of each dialogue, or pair."""
        return np.diff(self.starts)

    @property
    def positions(self) -> Int64[np.ndarray, "N"]:
        """Positions that each takes in a row: the last token of a segment is only a target."""
        return self.lengths - (1 if self.middles is None else 2)

    def row_id(self, index: int) -> str:
        """Returns the file and line of a dialogue, "train.jsonl:17"."""
        return self.demonstrations[int(self.rows[index])].row_id


def tokenize_demonstrations(
    demonstrations: Sequence[Demonstration],
    chat: ChatFormat,
    *,
    sequence_length: int,
    cache_dir: epath.PathLike | None,
    max_malformed_share: float = 0.01,
    names: SettingNames = TRAINING,
) -> TokenizedDemonstrations:
    """Tokenises demonstrations, unless already tokenised.

    Args:
        demonstrations: A stored split, or any sequence.
        chat: The chat format.
        sequence_length: Tokens per batch row. A dialogue keeps its first `sequence_length + 1`
            tokens, since the last one is only a target.
        cache_dir: Folder where the tokens are cached, keyed by demonstrations, chat format and
            length; None keeps them in memory.
        max_malformed_share: Share of dialogues that the chat template may fail to render.
        names: What messages call the settings.

    Returns:
        The tokenised dialogues, in the order of `demonstrations`.

    Raises:
        MalformedRowsError: More than `max_malformed_share` of the dialogues cannot be rendered, or
            none has a target.
    """
    identity = [_CACHE_VERSION, _content_hash(demonstrations), chat.fingerprint, sequence_length]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    array_names = _array_names(demonstrations)
    if cache_dir is None:
        streams = {name: io.BytesIO() for name in array_names}
        report = _encode_into(streams, demonstrations, chat, sequence_length)
        arrays = {
            name: np.frombuffer(stream.getbuffer(), _ARRAYS[name])
            for name, stream in streams.items()
        }
    else:
        # Earlier versions kept pairs of equal answers.
        distinct = "-distinct" if "middles" in array_names else ""
        folder, record = open_sealed_folder(
            usable_path(cache_dir) / "tokenized" / f"{fingerprint[:16]}{distinct}",
            lambda temporary: _write(temporary, demonstrations, chat, sequence_length),
            what="the cached tokens",
        )
        malformed = tuple(MalformedRow(*row) for row in record["malformed"])
        report = TokenizationReport(**{**record, "malformed": malformed})
        arrays = {name: _load(folder, name) for name in array_names}
    listed = list_malformed(report.malformed, report.malformed_count)
    if report.malformed_count > max_malformed_share * report.dialogues or not report.kept:
        raise MalformedRowsError(
            f"{names.source}: {report.malformed_count} of {report.dialogues} dialogues cannot be "
            f"rendered (at most {max_malformed_share:.1%} may be), and {report.kept} have an "
            f"assistant's token within the {sequence_length} tokens that are read{listed}\n"
            f"use another chat template, fix the rows, or raise {names.max_malformed} or "
            f"{names.max_length}"
        )
    report.log(sequence_length)
    return TokenizedDemonstrations(
        **{"middles": None, **arrays},
        demonstrations=demonstrations,
        sequence_length=sequence_length,
        # Without such pairs the tokens are those of earlier versions, whose runs can resume.
        fingerprint=fingerprint + ("/distinct" if report.equal_pairs else ""),
        report=report,
    )


_ARRAYS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "starts": np.int64,
    "rows": np.int64,
    "middles": np.int64,
}


def _array_names(demonstrations: Sequence[Demonstration]) -> list[str]:
    """The arrays that are kept; `middles` of preferences only."""
    in_pairs = bool(len(demonstrations) and demonstrations[0].rejected)
    return [name for name in _ARRAYS if in_pairs or name != "middles"]


def _content_hash(demonstrations: Sequence[Demonstration]) -> str:
    """Identifies demonstrations by their store's fingerprint, or by their content."""
    if isinstance(demonstrations, DemonstrationSplit):
        return demonstrations.fingerprint
    digest = hashlib.sha256()
    for demonstration in demonstrations:
        messages, row_id, rejected = demonstration
        digest.update(json.dumps([messages, row_id, *([rejected] if rejected else [])]).encode())
        untrained = [turn for turn, said in enumerate(messages) if not said.weight]
        digest.update(json.dumps(untrained).encode() if untrained else b"")
    return digest.hexdigest()


def _encode_into(
    streams: dict[str, BinaryIO] | dict[str, io.BytesIO],
    demonstrations: Sequence[Demonstration],
    chat: ChatFormat,
    sequence_length: int,
) -> TokenizationReport:
    """Writes the flat arrays, one chunk of dialogues at a time."""
    names = ("kept", "tokens", "targets", "cut", "dropped", "equal_pairs", "special_texts")
    counts = dict.fromkeys(names, 0)
    malformed: list[MalformedRow] = []
    beyond = 0
    in_pairs = "middles" in streams

    def write(name: str, values: Any) -> None:
        streams[name].write(np.asarray(values, _ARRAYS[name]).tobytes())

    write("starts", [0])
    for first, chunk in _chunks(demonstrations):
        encoded = encode_segments(
            chat,
            chunk,
            sequence_length=sequence_length,
            beyond_limits_at_most=_BEYOND_LIMITS_AT_MOST,
        )
        for row, (demonstration, dialogue) in enumerate(zip(chunk, encoded, strict=True), first):
            if isinstance(dialogue, ChatTemplateError):
                malformed.append(MalformedRow(demonstration.row_id, str(dialogue)))
                beyond += isinstance(dialogue, TemplateLimitError)
                if beyond > _BEYOND_LIMITS_AT_MOST:
                    raise MalformedRowsError(
                        f"demonstrations: the chat template exceeds its limits repeatedly: "
                        f"{demonstration.row_id}: {dialogue}; use another chat template"
                    )
                continue
            counts["special_texts"] += chat.has_special_text(
                (*demonstration.messages, *demonstration.rejected)
            )
            counts["cut"] += dialogue.was_cut
            if not dialogue.is_useful:
                counts["dropped"] += 1
                continue
            if dialogue.is_equal_pair:
                counts["equal_pairs"] += 1
                continue
            counts["kept"] += 1
            if in_pairs:
                write("middles", [counts["tokens"] + len(dialogue.parts[0].tokens)])
            for tokens, loss_mask in dialogue.parts:
                counts["tokens"] += len(tokens)
                counts["targets"] += int(loss_mask[1:].sum())
                write("tokens", tokens)
                write("loss_mask", loss_mask)
            write("starts", [counts["tokens"]])
            write("rows", [row])
    return TokenizationReport(
        dialogues=len(demonstrations),
        malformed=tuple(malformed[:100]),
        malformed_count=len(malformed),
        **counts,
    )


def _chunks(
    demonstrations: Sequence[Demonstration],
) -> Iterator[tuple[int, list[Demonstration]]]:
    """Dialogues in order, read ahead by Grain, with the index of the first of each chunk."""
    chunks = grain.MapDataset.source(demonstrations).batch(_CHUNK, batch_fn=list)  # type: ignore[arg-type]
    ahead: Iterable[list[Demonstration]] = chunks.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    shown = track(
        ahead,
        description="tokenising",
        total=len(chunks),
        console=Console(stderr=True),
        transient=True,
        disable=len(demonstrations) < _BAR_FROM_DIALOGUES or not sys.stderr.isatty(),
    )
    first = 0
    for chunk in shown:
        yield first, chunk
        first += len(chunk)


def _write(
    folder: epath.Path,
    demonstrations: Sequence[Demonstration],
    chat: ChatFormat,
    sequence_length: int,
) -> dict[str, Any]:
    """Writes the flat arrays as files of a new folder; returns the report as JSON."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as files:
        streams: dict[str, Any] = {
            name: files.enter_context((folder / f"{name}.bin").open("wb"))
            for name in _array_names(demonstrations)
        }
        return asdict(_encode_into(streams, demonstrations, chat, sequence_length))


def _load(folder: epath.Path, name: str) -> np.ndarray:
    """An array that is read from disk on demand."""
    path, dtype = folder / f"{name}.bin", _ARRAYS[name]
    if not path.stat().length:
        return np.frombuffer(path.read_bytes(), dtype)
    # A plain view: slicing a memmap object costs ten times as much.
    return np.asarray(np.memmap(str(path), dtype, mode="r"))
