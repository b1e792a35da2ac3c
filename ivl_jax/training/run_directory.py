"""The run directory: a run's config, its environment, and its measurements.

In: the config and records. Out: config.toml, starts.json, metrics.jsonl, timings.jsonl, and the
locations of TensorBoard events, checkpoints and the final model.

metrics.jsonl contains only what is a function of config and data, so a run that was killed and
resumed writes the same bytes as an uninterrupted one; wall-clock figures go to timings.jsonl.
"""

import logging
import platform
import re
import subprocess
import sys
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
from ivl_jax.file_lock import FileLock, LockedError, record_holder
from ivl_jax.json_files import read_json_list, read_json_object, write_json
from ivl_jax.paths import is_local, usable_path, write_atomically
from ivl_jax.text_files import shortened
from ivl_jax.toml_files import read_toml
from ivl_jax.training.record_file import RecordFile

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
LOCK_FILE = "run.lock"
WEIGHTS_FILE = "weights.json"

WeightsRecord = Mapping[str, str]

# What may differ between the start of a run and a resume: where and how it is computed and
# reported, but not what is computed.
_MAY_CHANGE = (
    "run_dir",
    "resume",
    "distributed",
    "processes",
    "compilation_cache",
    "profile",
    "mesh",
    "logging",
    "base.layout",
    "bases.layout",
    "value.layout",
    "step.remat",
)


class RunDirectoryError(ValueError):
    """A run directory that cannot be used: what, where, remedy."""


class RunDirectory:
    """The files of one run; only process 0 writes."""

    def __init__(self, path: epath.PathLike) -> None:
        self.path = usable_path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.value = self.path / "value"
        self.model = self.path / "model"
        self.metrics = RecordFile(self.path / "metrics.jsonl")
        self.timings = RecordFile(self.path / "timings.jsonl")
        self.samples = RecordFile(self.path / "samples.jsonl", ensure_ascii=False)

    def close_records(self) -> None:
        """Write all records that an object store does not have yet."""
        for records in (self.metrics, self.timings, self.samples):
            records.close()

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        in_a_clone = Path(sys.argv[0]).name == "train.py"
        program = "python train.py" if in_a_clone else "ivl-train"
        return f"{program} --config {self.path / CONFIG_FILE} --resume"

    @contextmanager
    def claim(self, config: TrainConfig) -> Iterator[bool]:
        """Check that a run may start or resume here, and keep other processes out meanwhile.

        On an object store nobody is kept out, but told who is there.

        Args:
            config: of the run.

        Yields:
            Whether there is a run to resume.

        Raises:
            RunDirectoryError: another process runs here, on this machine or another; or as `check`.
            ConfigError: as `check`.
        """
        self._check_is_run_directory()
        if jax.process_index() > 0:
            yield self.check(config)
            return
        if not is_local(self.path):
            there = self.check(config)
            with record_holder(self.path / LOCK_FILE):
                yield there
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(_remove_if_empty, Path(self.path))
            try:
                stack.enter_context(FileLock(Path(self.path / LOCK_FILE)))
            except LockedError as error:
                raise RunDirectoryError(
                    f"{self.path} is in use: {error}; wait until that run has ended, stop it, or "
                    "choose another run_dir"
                ) from None
            yield self.check(config)

    def check(self, config: TrainConfig) -> bool:
        """Check that a run may start or resume here; changes nothing.

        Args:
            config: of the run.

        Returns:
            Whether there is a run to resume.

        Raises:
            RunDirectoryError: the folder has a run and `resume` is not set, or it is not a run
                directory.
            ConfigError: its run was started with another config; the message names each difference.
        """
        if not self._check_is_run_directory():
            if config.resume:
                logger.warning("%s is empty or absent: nothing to resume, starting", self.path)
            return False
        if not config.resume:
            raise RunDirectoryError(
                f"{self.path} already contains a run: resume it with `{self.resume_command}`, or "
                "choose another run_dir"
            )
        self._check_same(config, self.path / CONFIG_FILE)
        return True

    def _check_is_run_directory(self) -> bool:
        """Whether the folder contains a run; anything else in it is an error."""
        # A run killed while it wrote its very first file has not started.
        if not self.path.exists() or all(
            path.name.startswith((f"{CONFIG_FILE}.tmp", LOCK_FILE)) for path in self.path.iterdir()
        ):
            return False
        if not (self.path / CONFIG_FILE).exists():
            raise RunDirectoryError(
                f"{self.path} exists, is not empty and is not a run directory (it has no "
                f"{CONFIG_FILE}): choose another run_dir"
            )
        return True

    def open(
        self, config: TrainConfig, *, there: bool, weights: Mapping[str, WeightsRecord]
    ) -> None:
        """Create the folder, and record the config and the weights (once) and this start.

        Args:
            config: of the run.
            there: what `check` returned.
            weights: config key → `path` and `fingerprint` of the weights it reads.

        Raises:
            RunDirectoryError: the records of earlier starts cannot be read.
        """
        if jax.process_index() > 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not there:
            # One file for all processes: each has a number of its own.
            processes = replace(config.processes, process_id=None)
            stored = replace(config, resume=False, processes=processes)
            text = config_to_toml(stored) + "\n"
            write_atomically(self.path / CONFIG_FILE, text.encode())
        starts_file = self.path / "starts.json"
        starts = _read_starts(starts_file)
        now = _this_start()
        if starts and starts[-1]["versions"] != now["versions"]:
            logger.warning(
                "library versions differ from those of the last start, so results may differ in "
                "the last bits: %s",
                _differences(starts[-1]["versions"], now["versions"]),
            )
        write_json(starts_file, [*starts, now], indent=2)
        if not (self.path / WEIGHTS_FILE).exists():
            write_json(self.path / WEIGHTS_FILE, weights)

    def check_weights(self, weights: Mapping[str, WeightsRecord]) -> None:
        """Check that the run reads the weights it was started with.

        Args:
            weights: config key → `path` and `fingerprint` of the current weights.

        Raises:
            RunDirectoryError: files under the same path have changed; the message names each.
            MalformedFileError: the record made at the start cannot be read.
        """
        stored = self.path / WEIGHTS_FILE
        if not stored.exists():  # a new run, or one by a version that did not record them
            return
        before = read_json_object(stored)
        changed = [
            f"{key} = {now['path']}: fingerprint {_fingerprint(before.get(key))} then, "
            f"{_fingerprint(now)} now"
            for key, now in weights.items()
            if _fingerprint(before.get(key)) != _fingerprint(now)
        ]
        if changed:
            listed = "".join(f"\n  - {line}" for line in changed)
            raise RunDirectoryError(
                f"{self.path} was started with other weights in the same place, as {stored.name} "
                f"tells:{listed}\n"
                "put the files back as they were, or name another run_dir"
            )

    def _check_same(self, config: TrainConfig, stored: epath.Path) -> None:
        document = read_toml(stored)
        before = _flat(config_to_mapping(config_from_mapping(document, where=str(stored))))
        after = _flat(config_to_mapping(config))
        changed = _differences(before, after, ignore=_MAY_CHANGE)
        if changed:
            raise ConfigError(
                f"{self.path} was started with another config: {changed}; resume with "
                f"`{self.resume_command}`, or choose another run_dir"
            )


def _read_starts(path: epath.Path) -> list[dict[str, Any]]:
    """Read the records of earlier starts."""
    starts = read_json_list(path) if path.exists() else []
    for number, start in enumerate(starts):
        if not isinstance(start, dict) or not isinstance(start.get("versions"), dict):
            raise RunDirectoryError(
                f"{path}: entry {number}: expected an object with the object 'versions'; move the "
                "file away (it only records earlier starts)"
            )
    return starts


def _fingerprint(record: Any) -> str:
    """The beginning of the fingerprint in a record, which may be malformed."""
    found = record.get("fingerprint") if isinstance(record, Mapping) else None
    return found[:12] if isinstance(found, str) else "none"


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
    """The commit of the source code, `+changes` if the working tree differs; None outside git."""

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
    # Only if this file belongs to the repository: a package may be installed inside another one.
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
        f"{name} was {shortened(before.get(name), characters=300)}, "
        f"now {shortened(after.get(name), characters=300)}"
        for name in names
        if before.get(name) != after.get(name)
    )
