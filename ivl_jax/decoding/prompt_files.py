"""Prompts from a JSONL file and generations into another, written as they come and resumable.

In: `{"prompt": text}` or `{"messages": [{"role", "content"}, …]}` per line, optionally with
`"strengths": [α, …]`. Out: the same lines with `text`, `finish_reason` and token counts added.
Imports no JAX: bad files are reported at once.

OUTPUT.settings.json records what OUTPUT was made with; a second run resumes only with the same
settings and the same prompts.
"""

import errno
import hashlib
import json
import logging
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath

from ivl_jax.checkpoint.value_card import UNSEALED
from ivl_jax.checkpoint.value_metadata import METADATA_NAME
from ivl_jax.config import ConfigError, strength_problem
from ivl_jax.file_lock import FileLock, LockedError
from ivl_jax.json_files import JsonLine, json_kind, read_json_lines, read_json_object, write_json
from ivl_jax.text_files import MalformedFileError, shortened

logger = logging.getLogger(__name__)

_ADDED_FIELDS = ("text", "finish_reason", "prompt_tokens", "generated_tokens")
# Fields that a line has besides those of its row where something went wrong.
_OPTIONAL_FIELDS = ("error",)
_ROLES = ("system", "user", "assistant")
_MOST_PROBLEMS_NAMED = 20
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class PromptRow:
    """One line of the input file.

    Attributes:
        where: `FILE:LINE`, for messages.
        record: The whole line.
        text: The prompt, or None for a dialogue.
        messages: (role, content) pairs of a dialogue; empty for a text.
        strengths: α of each value network for this line, or None for those of the command.
    """

    where: str
    record: Mapping[str, Any]
    text: str | None
    messages: tuple[tuple[str, str], ...]
    strengths: tuple[float, ...] | None = None


def read_prompts(path: Path, *, values: int) -> list[PromptRow]:
    """Read a file of prompts, all of it, strictly.

    Args:
        path: JSONL; empty lines do not count.
        values: value networks of the composition; a line's `strengths` has one number for each.

    Returns:
        One row a line, in order.

    Raises:
        ConfigError: no such file, no prompts in it, or malformed lines (at most 20 are named).
    """
    if not path.is_file():
        raise ConfigError(f"--input: no file at {path}")
    rows, problems = [], []
    for line in read_json_lines(path):
        where = f"{path}:{line.number}"
        if line.error is not None:
            column = "" if line.error.column is None else f":{line.error.column}"
            problems.append(f"{where}{column}: {line.error.reason}")
            continue
        try:
            rows.append(_parse_row(line.value, where, values=values))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = len(problems) - _MOST_PROBLEMS_NAMED
        named = "\n".join(f"  - {problem}" for problem in problems[:_MOST_PROBLEMS_NAMED])
        raise ConfigError(
            f"--input: {len(problems)} malformed line(s); expected "
            '{"prompt": text} or {"messages": [{"role": …, "content": …}, …]}, and perhaps '
            '"strengths": [α, …]:\n'
            f"{named}" + (f"\n  and {more} more" if more > 0 else "")
        )
    if not rows:
        raise ConfigError(f"--input: {path} has no prompts")
    return rows


def folder_fingerprint(folder: epath.PathLike) -> str:
    """Identify a model's folder by its files' names, sizes, first and last MiB.

    Args:
        folder: local, or a URL that `etils.epath` reads.

    Returns:
        Hexadecimal SHA-256; other weights of the same shape give another one, in milliseconds a
        gigabyte.
    """
    root = epath.Path(folder)
    digest = hashlib.sha256()
    edited = UNSEALED if (root / METADATA_NAME).exists() else frozenset()
    for path in _files_below(root):
        if path.parent == root and path.name in edited:  # no part of the value network
            continue
        size = path.stat().length
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(size - _SAMPLED_BYTES, 0))
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


class GenerationFile:
    """The output file: knows what is done, and appends one whole line at a time.

    While it is open, no other process can open it: OUTPUT.lock says who holds it.

    Args:
        path: the JSONL file.
        settings: everything that decides the texts; compared with what the file was made with.
        rows: the prompts, in order.
        added: fields that every finished line has besides those of its row.
        writes: whether lines are written; of several processes that decode together, one does.

    Raises:
        ConfigError: the file was made with other settings or other prompts, or by something else,
            and is left as it is; or another process holds it.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        settings: Mapping[str, Any],
        rows: Sequence[PromptRow],
        added: Sequence[str] = _ADDED_FIELDS,
        writes: bool = True,
    ) -> None:
        self._path = path
        self._rows = rows
        self.done = 0
        """Rows whose line is there already."""
        self._file: int | None = None
        with ExitStack() as stack:
            if writes:
                path.parent.mkdir(parents=True, exist_ok=True)
                _lock(path, stack)
            self._open(settings, added, writes=writes)
            self._held = stack.pop_all()

    def _open(self, settings: Mapping[str, Any], added: Sequence[str], *, writes: bool) -> None:
        path, settings_path = self._path, self._path.with_name(self._path.name + ".settings.json")
        whole = 0
        if path.exists() and path.stat().st_size:
            _compare_settings(path, settings_path, settings)
            self.done, whole = _count_done(path, self._rows, added)
        elif writes:
            write_json(settings_path, settings, indent=2)
        if writes:
            if path.exists():
                _drop_half_line(path, whole)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    @property
    def next_row(self) -> PromptRow:
        """The first row that has no line yet."""
        return self._rows[self.done]

    def append(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Write the next rows' results, each line in one piece.

        Args:
            results: the added fields of each row, and perhaps more.

        Raises:
            OSError: a line could not be written; what is in the file are whole lines.
        """
        for result in results:
            record = {**self._rows[self.done].record, **result}
            if self._file is not None:
                self._write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            self.done += 1

    def _write(self, line: bytes) -> None:
        """Write a line, or nothing of it."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        try:
            # One call, so that a reader or a kill sees the line whole but for a full disk.
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Flush to disk and close."""
        with self._held:
            if self._file is not None:
                descriptor, self._file = self._file, None
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def __enter__(self) -> "GenerationFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(path: Path, stack: ExitStack) -> None:
    """Keep every other process from writing the same file until the stack is closed."""
    try:
        stack.enter_context(FileLock(path.with_name(path.name + ".lock")))
    except LockedError as error:
        raise ConfigError(
            f"--output: {path} is in use: {error}; wait until that process has ended or stop it, "
            "or name another file"
        ) from error


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files, in order; `epath` has no recursive glob."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _parse_row(record: Any, where: str, *, values: int) -> PromptRow:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    json.dumps(record, ensure_ascii=False).encode()  # raises on half of a surrogate pair
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(f"expected either prompt or messages, got the keys {sorted(record)}")
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise ValueError(f"prompt must be a text, got {type(record['prompt']).__name__}")
        return PromptRow(where, record, record["prompt"], (), _strengths(record, values))
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list that is not empty")
    for index, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"messages[{index}] must have a role of {', '.join(_ROLES)} and a content text"
            )
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message must be the user's, got {messages[-1]['role']}")
    pairs = tuple((m["role"], m["content"]) for m in messages)
    return PromptRow(where, record, None, pairs, _strengths(record, values))


def _strengths(record: Mapping[str, Any], values: int) -> tuple[float, ...] | None:
    given = record.get("strengths")
    if given is None:
        return None
    numbers = isinstance(given, list) and all(type(alpha) in (int, float) for alpha in given)
    if not numbers or len(given) != values:
        raise ValueError(
            f"strengths must be a list of {values} number(s), one per value network, got "
            f"{textwrap.shorten(repr(given), 80)}"
        )
    for alpha in given:
        if problem := strength_problem(alpha):
            raise ValueError(f"each of strengths {problem}")
    return tuple(float(alpha) for alpha in given)


def _compare_settings(path: Path, settings_path: Path, settings: Mapping[str, Any]) -> None:
    if not settings_path.is_file():
        raise ConfigError(
            f"--output: {path} exists, but not {settings_path.name}, which says how it was made: "
            "name another file, or remove this one"
        )
    try:
        then = read_json_object(settings_path)
    except MalformedFileError as error:
        raise ConfigError(
            f"--output: {error}; it says how {path} was made: name another file, or remove both"
        ) from error
    now = json.loads(json.dumps(settings))
    differing = [
        f"{name}: {shortened(then.get(name), characters=300)} there, "
        f"{shortened(now.get(name), characters=300)} now"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise ConfigError(
            f"--output: {path} was written with other settings, as {settings_path.name} tells "
            f"({'; '.join(differing)}): use the same ones to resume, or name another file"
        )


def _drop_half_line(path: Path, whole: int) -> None:
    """Cut off what follows the last newline: a line that a killed run did not finish."""
    rest = path.stat().st_size - whole
    if rest:
        logger.warning("%s: dropped a half-written last line of %d bytes", path, rest)
        os.truncate(path, whole)


def _count_done(path: Path, rows: Sequence[PromptRow], added: Sequence[str]) -> tuple[int, int]:
    """Check the lines of an output file.

    Returns:
        How many lines are whole, and their length in bytes.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    count = content.count(b"\n", 0, whole)
    if count > len(rows):
        raise ConfigError(
            f"--output: {path} has {count} lines, but the input only {len(rows)} prompts: "
            "name another file"
        )
    read = {line.number: line for line in read_json_lines(path) if line.number <= count}
    replaced = {*added, *_OPTIONAL_FIELDS}
    for number, row in enumerate(rows[:count], 1):
        if reason := _line_problem(read.get(number)):
            raise ConfigError(
                f"--output: {path}:{number}: {reason}; the file has been edited, and is kept: mend "
                "the line, or name another file"
            )
        record = read[number].value
        own = {name: value for name, value in row.record.items() if name not in replaced}
        if any(record.get(name) != value for name, value in own.items()) or not all(
            name in record for name in added
        ):
            raise ConfigError(
                f"--output: {path}:{number} is not the result of {row.where}: the input or this "
                "file has been edited since; name another file"
            )
    return count, whole


def _line_problem(line: JsonLine | None) -> str | None:
    if line is None:
        return "the line is empty"
    if line.error is not None:
        return line.error.reason
    return (
        None if isinstance(line.value, dict) else f"expected an object, got {json_kind(line.value)}"
    )
