"""The run directory: what a run was told, what it ran on, and what it measured.

In: the config and records. Out: config.toml, starts.json, metrics.jsonl, timings.jsonl, and the
places of TensorBoard events, checkpoints and the final model.

metrics.jsonl holds only what is a function of config and data, so a run that was killed and resumed
writes the same bytes as one that never stopped; wall-clock figures go to timings.jsonl.
"""

import json
import logging
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ivl_jax.checkpoint.value_metadata import library_versions
from ivl_jax.config import (
    ConfigError,
    TrainConfig,
    config_from_mapping,
    config_to_mapping,
    config_to_toml,
)
from ivl_jax.file_lock import FileLock, LockedError
from ivl_jax.paths import flush_folder, write_atomically

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
LOCK_FILE = "run.lock"

# What may differ between the start of a run and its continuation: where and how it is computed and
# reported, never what is computed.
_MAY_CHANGE = (
    "run_dir",
    "resume",
    "distributed",
    "compilation_cache",
    "profile",
    "mesh",
    "logging",
    "base.layout",
    "bases.layout",
    "value.layout",
)


class RunDirectoryError(ValueError):
    """A run directory that cannot be used: what, where, remedy."""


class RunDirectory:
    """The files of one run; only process 0 writes."""

    def __init__(self, path: epath.PathLike) -> None:
        self.path = epath.Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.value = self.path / "value"
        self.model = self.path / "model"
        self.metrics = RecordFile(self.path / "metrics.jsonl")
        self.timings = RecordFile(self.path / "timings.jsonl")

    @property
    def resume_command(self) -> str:
        """The command that continues this run."""
        return f"python train.py --config {self.path / CONFIG_FILE} --resume"

    @contextmanager
    def claim(self, config: TrainConfig) -> Iterator[bool]:
        """Check that a run may begin or continue here, and keep every other process out meanwhile.

        Args:
            config: of the run that wants to.

        Yields:
            Whether there is a run to continue.

        Raises:
            RunDirectoryError: another process runs here, on this machine or another; or as `check`.
            ConfigError: as `check`.
        """
        self._check_is_run_directory()
        if jax.process_index() > 0 or not _is_local(self.path):
            yield self.check(config)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(_remove_if_empty, Path(self.path))
            try:
                stack.enter_context(FileLock(Path(self.path / LOCK_FILE)))
            except LockedError as error:
                raise RunDirectoryError(
                    f"{self.path} is in use: {error}; wait until that run has ended or stop it, or "
                    "name another run_dir"
                ) from None
            yield self.check(config)

    def check(self, config: TrainConfig) -> bool:
        """Check that a run may begin or continue here; changes nothing.

        Args:
            config: of the run that wants to.

        Returns:
            Whether there is a run to continue.

        Raises:
            RunDirectoryError: a run is there and `resume` was not said; or the folder holds
                something else.
            ConfigError: the run there was started with another config; names each difference.
        """
        if not self._check_is_run_directory():
            if config.resume:
                logger.warning("%s is empty or absent: nothing to resume, starting", self.path)
            return False
        if not config.resume:
            raise RunDirectoryError(
                f"{self.path} holds a run already: continue it with `{self.resume_command}`, or "
                "name another run_dir"
            )
        self._check_same(config, self.path / CONFIG_FILE)
        return True

    def _check_is_run_directory(self) -> bool:
        """Say whether there is anything; what is there must be a run."""
        # A run killed while it wrote its very first file has not begun.
        if not self.path.exists() or all(
            path.name.startswith((f"{CONFIG_FILE}.tmp", LOCK_FILE)) for path in self.path.iterdir()
        ):
            return False
        if not (self.path / CONFIG_FILE).exists():
            raise RunDirectoryError(
                f"{self.path} exists, is not empty and is not a run directory (it has no "
                f"{CONFIG_FILE}): name another run_dir"
            )
        return True

    def open(self, config: TrainConfig, *, there: bool) -> None:
        """Make the folder and write down the config (once) and this start.

        Args:
            config: of the run.
            there: what `check` returned.
        """
        if jax.process_index() > 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not there:
            text = config_to_toml(replace(config, resume=False)) + "\n"
            write_atomically(self.path / CONFIG_FILE, text.encode())
        starts_file = self.path / "starts.json"
        starts = json.loads(starts_file.read_text()) if starts_file.exists() else []
        now = _this_start()
        if starts and starts[-1]["versions"] != now["versions"]:
            logger.warning(
                "other library versions than at the last start; the continuation may differ in "
                "the last bits: %s",
                _differences(starts[-1]["versions"], now["versions"]),
            )
        write_atomically(starts_file, (json.dumps([*starts, now], indent=2) + "\n").encode())

    def _check_same(self, config: TrainConfig, stored: epath.Path) -> None:
        document = tomllib.loads(stored.read_text())
        before = _flat(config_to_mapping(config_from_mapping(document, where=str(stored))))
        after = _flat(config_to_mapping(config))
        changed = _differences(before, after, ignore=_MAY_CHANGE)
        if changed:
            raise ConfigError(
                f"{self.path} was started with another config: {changed}; resume with "
                f"`{self.resume_command}`, or name another run_dir"
            )


class RecordFile:
    """A JSON-lines file that can be cut back; on an object store it is rewritten when flushed."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._lines: list[bytes] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it survives a kill of the process from here on (local files).

        Raises:
            OSError: it cannot be written; names the file.
        """
        if jax.process_index() > 0:
            return
        line = json.dumps(record).encode() + b"\n"
        if _is_local(self.path):
            try:
                with Path(self.path).open("ab") as file:
                    file.write(line)
            except OSError as error:
                # A write that fails, on a full disk say, does not name its file.
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            return
        if self._lines is None:
            self._lines = [self.path.read_bytes()] if self.path.exists() else []
        self._lines.append(line)

    def flush(self) -> int:
        """Make the records durable: they survive a power failure from here on.

        Returns:
            The size of the file, bytes.
        """
        if jax.process_index() > 0:
            return 0
        if self._lines is not None:
            self.path.write_bytes(b"".join(self._lines))
        if not self.path.exists():
            return 0
        if _is_local(self.path):
            with Path(self.path).open("ab") as file:
                os.fsync(file.fileno())
            flush_folder(str(self.path.parent))
        return self.path.stat().length

    def missing_records(self, size: int) -> str | None:
        """Say whether the file is shorter than `flush` once returned, in bytes.

        Returns:
            A sentence, or None where the file is long enough.
        """
        found = self.path.stat().length if self.path.exists() else 0
        if found >= size:
            return None
        return (
            f"{self.path} has {found} bytes, this checkpoint was saved when it had {size}: records "
            "are missing"
        )

    def cut(self, size: int) -> None:
        """Cut the file back to a size that `flush` returned, in bytes.

        Raises:
            RunDirectoryError: the file is shorter: records are missing.
        """
        if jax.process_index() > 0:
            return
        if (problem := self.missing_records(size)) is not None:
            raise RunDirectoryError(f"{problem}; restore the file, or name another run_dir")
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) > size:
            write_atomically(self.path, content[:size])
        self._lines = None

    def last_step(self) -> int:
        """Give the largest `step` of the whole records; −1 if there is none."""
        last = -1
        if self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    last = max(last, json.loads(line)["step"])
                except ValueError:
                    continue
        return last


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _this_start() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": library_versions(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the sources, `+changes` when the working tree differs; None outside git."""

    def git(*arguments: str) -> str | None:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # Only when this very file belongs to the repository: an installed package lies in others'.
    if not commit or git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, tuple) and any(isinstance(item, Mapping) for item in value):
            flat |= _flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> str:
    ignored = tuple(f"{name}." for name in ignore)
    names = [
        name
        for name in {**before, **after}
        if not re.sub(r"\.\d+\.", ".", f"{name}.").startswith(ignored)
    ]
    return ", ".join(
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    )
