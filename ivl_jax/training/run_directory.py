"""The run directory: what a run was told, what it ran on, and what it measured.

In: the config and records. Out: config.toml, starts.json, metrics.jsonl, timings.jsonl, and the
places of TensorBoard events, checkpoints and the final model.

metrics.jsonl holds only what is a function of config and data, so a run that was killed and resumed
writes the same bytes as one that never stopped; wall-clock figures go to timings.jsonl.
"""

import json
import logging
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ivl_jax.checkpoint.value_metadata import library_versions
from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.config_files import config_from_mapping, config_to_mapping, config_to_toml
from ivl_jax.paths import write_atomically

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"

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
        # A run killed while it wrote its very first file has not begun.
        there = self.path.exists() and any(
            not path.name.startswith(f"{CONFIG_FILE}.tmp") for path in self.path.iterdir()
        )
        if not there:
            if config.resume:
                logger.warning("%s is empty or absent: nothing to resume, starting", self.path)
            return False
        stored = self.path / CONFIG_FILE
        if not stored.exists():
            raise RunDirectoryError(
                f"{self.path} exists, is not empty and is no run directory (it has no "
                f"{CONFIG_FILE}): name another run_dir"
            )
        if not config.resume:
            raise RunDirectoryError(
                f"{self.path} holds a run already: continue it with `{self.resume_command}`, or "
                "name another run_dir"
            )
        self._check_same(config, stored)
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
        """Add a record; it survives a kill of the process from here on (local files)."""
        if jax.process_index() > 0:
            return
        line = json.dumps(record).encode() + b"\n"
        if _is_local(self.path):
            with Path(self.path).open("ab") as file:
                file.write(line)
            return
        if self._lines is None:
            self._lines = [self.path.read_bytes()] if self.path.exists() else []
        self._lines.append(line)

    def flush(self) -> int:
        """Write what is only in memory (object stores).

        Returns:
            The size of the file, bytes.
        """
        if jax.process_index() > 0:
            return 0
        if self._lines is not None:
            self.path.write_bytes(b"".join(self._lines))
        return self.path.stat().length if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Cut the file back to a size that `flush` returned, in bytes.

        Raises:
            RunDirectoryError: the file is shorter: records are missing.
        """
        if jax.process_index() > 0:
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) < size:
            raise RunDirectoryError(
                f"{self.path} has {len(content)} bytes, the checkpoint was saved when it had "
                f"{size}: records are missing; restore the file, or name another run_dir"
            )
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
