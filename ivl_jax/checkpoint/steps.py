"""The checkpoint folder of a run: which steps it has and which of them are intact.

In: a folder with one sub-folder per step, each with its hash manifest. Out: the newest step that is
exactly as it was written, and what is wrong with each newer one. Does not import JAX.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from ivl_jax.json_files import read_json_object
from ivl_jax.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    file_problems,
    read_manifest,
)

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"0|[1-9]\d*")
_UNFINISHED_FOLDER = re.compile(r"(0|[1-9]\d*)\.orbax-checkpoint-tmp.*")
_SET_ASIDE_FOLDER = re.compile(r"(0|[1-9]\d*)\.unusable.*")


class RejectedStep(NamedTuple):
    """A checkpoint that cannot be used."""

    step: int  # its label
    reasons: tuple[str, ...]  # one sentence per file that is missing, truncated or altered

    def __str__(self) -> str:
        """Name the step and each reason."""
        return f"step {self.step}: " + "; ".join(self.reasons)


class NoUsableCheckpointError(RuntimeError):
    """No checkpoint of a run is exactly as it was written; lists the reason for each."""


def committed_steps(directory: epath.PathLike) -> list[int]:
    """List the steps that Orbax committed, oldest first, whether intact or not."""
    return sorted(int(name) for name in _folders(directory) if _STEP_FOLDER.fullmatch(name))


def has_started(directory: epath.PathLike) -> bool:
    """Whether a run in this folder may have taken a training step.

    Step 0 is complete before the first training step. So a folder that has only unfinished saves
    and at most a step 0 without a manifest belongs to a run that was stopped before it began.

    Args:
        directory: the checkpoint folder; it need not exist.

    Returns:
        False only if no training step can have been taken.
    """
    if any(_SET_ASIDE_FOLDER.fullmatch(name) for name in _folders(directory)):
        return True
    steps = committed_steps(directory)
    if steps != [0]:
        return bool(steps)
    return (epath.Path(directory) / "0" / MANIFEST_NAME).exists()


FileCheck = Callable[[epath.Path, Manifest], tuple[str, ...]]
"""Compares a step's folder with its manifest, as `file_problems` does."""


def step_problems(
    directory: epath.PathLike, step: int, *, check: FileCheck = file_problems
) -> tuple[str, ...]:
    """Check every byte of one step against its manifest.

    Args:
        directory: the checkpoint folder.
        step: the step's label.
        check: reads and compares the files.

    Returns:
        What is wrong, one sentence per file; empty if the step is as it was written.
    """
    folder = epath.Path(directory) / str(step)
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return (str(error),)
    if manifest.about.get("step") != step:
        return (f"the folder {step} contains step {manifest.about.get('step')}: it was renamed",)
    logger.info("checking step %d: %.1f MB", step, manifest.total_bytes / 1e6)
    return check(folder, manifest)


def find_usable_step(
    directory: epath.PathLike,
    step: int | None,
    fits: Callable[[dict[str, Any]], str | None] = lambda run_metadata: None,
    check: FileCheck = file_problems,
) -> tuple[int, tuple[RejectedStep, ...]]:
    """Find the newest intact step, and what is wrong with each newer one.

    Args:
        directory: the checkpoint folder.
        step: only this step; None: the newest intact one.
        fits: given a step's JSON about the run, returns why it cannot be used, or None.
        check: reads and compares the files of a step.

    Returns:
        The step, and the newer ones that cannot be used, newest first. An interrupted save (Orbax's
        temporary folder) counts as one of them.

    Raises:
        NoUsableCheckpointError: none is intact; lists the reasons.
    """
    directory = epath.Path(directory)
    committed = committed_steps(directory)
    if step is not None and step not in committed:
        raise NoUsableCheckpointError(
            f"{directory} has no step {step}; it has {committed or 'none'}"
        )
    unfinished = {}
    for name in _folders(directory):
        if match := _UNFINISHED_FOLDER.fullmatch(name):
            unfinished[int(match[1])] = name
    rejected = []
    for candidate in sorted({*committed, *unfinished}, reverse=True):
        if step is not None and candidate != step:
            continue
        if candidate in committed:
            problems = step_problems(directory, candidate, check=check)
            if not problems and (reason := fits(run_metadata(directory, candidate))) is not None:
                problems = (reason,)
            if not problems:
                return candidate, tuple(rejected)
        else:
            problems = (f"{unfinished[candidate]}: the process stopped while it was being saved",)
        rejected.append(RejectedStep(candidate, problems))
    listed = "".join(f"\n  - {one}" for one in rejected) or "\n  - it has no checkpoint"
    raise NoUsableCheckpointError(
        f"no checkpoint in {directory} can be used:{listed}\n"
        "restore the files from a copy, or start a new run in another run_dir; "
        "nothing was changed"
    )


def run_metadata(directory: epath.PathLike, step: int) -> dict[str, Any]:
    """Read the JSON about the run that was saved with a step.

    Raises:
        MalformedFileError: It cannot be read, although its manifest says that it is as written.
    """
    return read_json_object(epath.Path(directory) / str(step) / "run" / "metadata")


def complete_steps(directory: epath.PathLike) -> dict[int, Manifest]:
    """Read the manifests of the steps whose files all exist with the right size (not hashed).

    Args:
        directory: the checkpoint folder.

    Returns:
        Step → manifest, oldest first.
    """
    found = {}
    for step in committed_steps(directory):
        folder = epath.Path(directory) / str(step)
        try:
            manifest = read_manifest(folder)
        except ManifestError:
            continue
        if not file_problems(folder, manifest, sizes_only=True):
            found[step] = manifest
    return found


def best_step(
    metrics: Mapping[int, Mapping[str, float]], metric: str, *, lower_is_better: bool
) -> int | None:
    """Choose the step with the best value of a metric; ties go to the earliest.

    Args:
        metrics: step → its recorded metrics.
        metric: which of them decides.
        lower_is_better: whether smaller values are better.

    Returns:
        The step; None if no step has a finite value.
    """
    sign = 1.0 if lower_is_better else -1.0
    scores = {
        step: sign * values[metric]
        for step, values in sorted(metrics.items())
        if math.isfinite(values.get(metric, math.nan))
    }
    return min(scores, key=scores.__getitem__, default=None)


def set_aside(directory: epath.PathLike, step: int) -> str:
    """Rename an unusable step's folder so that training can write that step again.

    Args:
        directory: the checkpoint folder.
        step: the step's label.

    Returns:
        The folder's new name; it is never read again, only kept for inspection.
    """
    directory = epath.Path(directory)
    taken = set(_folders(directory))
    names = (f"{step}.unusable{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 1000))])
    name = next(name for name in names if name not in taken)
    (directory / str(step)).rename(directory / name)
    return name


def delete_step(directory: epath.PathLike, step: int) -> None:
    """Delete a step's folder, its manifest first, so that a half-deleted step is not sealed.

    Args:
        directory: the checkpoint folder.
        step: the step's label.
    """
    folder = epath.Path(directory) / str(step)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    folder.rmtree()


def _folders(directory: epath.PathLike) -> list[str]:
    directory = epath.Path(directory)
    return [path.name for path in directory.iterdir()] if directory.exists() else []


def recorded_metrics(manifest: Manifest) -> dict[str, Any]:
    """The metrics recorded with a step."""
    return manifest.about.get("metrics", {})
