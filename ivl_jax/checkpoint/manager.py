"""Checkpoints of a training run: written in the background, verified bit by bit when read.

In: the train state, the data position and JSON about the run. Out: one folder per step, labelled
`state.step`, written by Orbax and sealed with a hash manifest; later the newest intact one.

Once Orbax has written a step completely, a single rename gives its folder the final name; then a
background thread hashes the files, writes the manifest, which seals the step, and only then deletes
old steps: at least one sealed checkpoint always exists.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ivl_jax.checkpoint.arrays import restore_arrays, to_storable
from ivl_jax.checkpoint.data_position import DataState, pack_data_states, unpack_data_state
from ivl_jax.checkpoint.steps import (
    RejectedStep,
    best_step,
    committed_steps,
    complete_steps,
    delete_step,
    has_started,
    recorded_metrics,
    set_aside,
)
from ivl_jax.checkpoint.together import agree_on_step, seal_step
from ivl_jax.manifest import MANIFEST_NAME, read_manifest, replace_about
from ivl_jax.paths import absolute_path

logger = logging.getLogger(__name__)


class CheckpointSaveError(OSError):
    """A checkpoint that could not be written: step, folder, reason, what is left to resume from."""


class RestoredRun(NamedTuple):
    """The state of a run when a checkpoint was saved."""

    step: int  # the checkpoint's label, equal to state.step
    state: Any  # the train state, with the target's structure and shardings
    data_state: Any  # this process's saved `data_state`: bytes, a JSON mapping or None
    run_metadata: dict[str, Any]  # the saved `run_metadata`
    rejected: tuple[RejectedStep, ...]  # newer checkpoints that cannot be used


class TrainCheckpointer:
    """Saves and restores a run; a context manager that waits for its last save.

    Reading does not change the disk. The first save after a `restore` removes what the restore
    rejected: unfinished saves are deleted, altered ones are renamed to `STEP.unusable`.

    Attributes:
        directory: the checkpoint folder.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int,
        metric: str = "nll",
        lower_is_better: bool = True,
        timeout: int = 300,
    ) -> None:
        """Set the folder and how many checkpoints to keep; touches no file.

        Args:
            directory: the checkpoint folder, local or a URL that `etils.epath` writes.
            keep: newest checkpoints kept, at least 1; one more while the newest is being written
                and sealed.
            metric: the best checkpoint by this entry of `metrics` is kept as well.
            lower_is_better: whether smaller values of the metric are better.
            timeout: seconds that a process waits for the others during a save.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = absolute_path(directory)
        self._keep = keep
        self._metric = metric
        self._lower_is_better = lower_is_better
        self._timeout = timeout
        self._manager: ocp.CheckpointManager | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint_manifest")
        self._pending: Future[None] | None = None
        self._failed = False
        self._newest: int | None = None  # the step saved last, or restored, by this object
        self._rejected: tuple[RejectedStep, ...] = ()
        self._metrics: dict[int, dict[str, float]] = {}  # of the sealed steps

    def save(
        self,
        state: Any,
        *,
        data_state: DataState,
        run_metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        leave_out: Sequence[str] = (),
    ) -> bool:
        """Save a train state under the label `state.step`, in the background.

        Waits for the previous save, and returns once the arrays have been copied from the devices,
        so that their buffers may be donated.

        Args:
            state: pytree of arrays with a field `step`; typed PRNG keys are allowed.
            data_state: this process's data position: bytes, JSON or None.
            run_metadata: JSON about the run, equal in every process.
            metrics: held-out figures of this state, if measured.
            leave_out: fields of the state that are not stored; `fill` of `restore` makes them.

        Returns:
            False if this step is already saved, by this object or by the run it restored.

        Raises:
            FileExistsError: the folder has checkpoints that this run did not resume from.
            TypeError: the metadata or the data position is not JSON.
            CheckpointSaveError: the save before this one failed, or this one at once.
        """
        self.wait_until_finished()
        step = int(state.step)
        if step == self._newest:
            return False
        run = json.loads(json.dumps(dict(run_metadata)))
        measured = {name: float(value) for name, value in (metrics or {}).items()}
        data = pack_data_states(data_state)
        if self._manager is None:
            self._manager = self._open(step)
        stored = {name: leaf for name, leaf in to_storable(state).items() if name not in leave_out}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(stored),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave(run),
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            self._failed = True
            raise self._save_error(step, error) from error
        self._newest = step
        self._pending = self._worker.submit(
            self._seal, self._manager, step, measured, tuple(leave_out)
        )
        return True

    def record_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record held-out figures of the newest step that were measured after it was saved.

        Args:
            metrics: of the newest saved state.
        """
        self.wait_until_finished()
        assert self._newest is not None
        measured = {name: float(value) for name, value in metrics.items()}
        if jax.process_index() == 0:
            folder = self.directory / str(self._newest)
            left_out = read_manifest(folder).about.get("left_out", ())
            replace_about(folder, self._about(self._newest, measured, left_out))
        self._metrics[self._newest] = measured

    def wait_until_finished(self) -> None:
        """Wait until the last save is committed and sealed.

        Raises:
            CheckpointSaveError: it failed; the older checkpoints are untouched then.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                self._failed = True
                raise self._save_error(self._newest, error) from error

    def restore(
        self,
        target: Any,
        *,
        step: int | None = None,
        fits: Callable[[dict[str, Any]], str | None] = lambda run_metadata: None,
        fill: Callable[[Any], Any] | None = None,
    ) -> RestoredRun:
        """Read the newest intact checkpoint, or a given one.

        Args:
            target: the train state or its `ShapeDtypeStruct`s; each array is read directly onto the
                devices of its sharding, whose mesh may differ from the one that saved.
            step: only this step; None: the newest one with every byte as written. Newer ones that
                are unfinished, truncated or altered are named in a warning.
            fits: given a checkpoint's `run_metadata`, returns why it cannot be used, or None; one
                that does not fit is rejected. Called in process 0 only.
            fill: makes the whole state from one whose left-out fields are None.

        Returns:
            The run as it was saved.

        Raises:
            NoUsableCheckpointError: no checkpoint is intact; lists the reason for each.
            TreeMismatchError: the checkpoint has other arrays than the target.
            ValueError: another number of processes saved different data positions.
        """
        self.wait_until_finished()
        found, rejected = agree_on_step(self.directory, step, fits)
        for one in rejected:
            logger.warning("a checkpoint in %s cannot be used: %s", self.directory, one)
        folder = self.directory / str(found)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            items = reader.restore(
                folder,
                args=ocp.args.Composite(data=ocp.args.JsonRestore(), run=ocp.args.JsonRestore()),
            )
        data_state = unpack_data_state(items["data"], folder)
        left_out = read_manifest(folder).about.get("left_out", ())
        state = restore_arrays(
            folder / "state",
            target._replace(**dict.fromkeys(left_out)) if left_out else target,
            what=f"the train state in {folder}",
            remedy="resume with the configuration that the run was started with (config.toml in "
            "its run directory), or start a new run",
        )
        if int(state.step) != found:
            raise ValueError(f"{folder} has state.step = {int(state.step)}, expected {found}")
        if left_out:
            if fill is None:
                raise ValueError(f"{folder} has no {', '.join(left_out)}, and no `fill` was given")
            state = fill(state)
        self._newest, self._rejected = found, rejected
        if rejected:
            logger.warning("resuming from step %d of %s", found, self.directory)
        return RestoredRun(found, state, data_state, dict(items["run"]), rejected)

    def steps(self) -> list[int]:
        """List the complete steps (all files exist; hashes not checked), oldest first."""
        self.wait_until_finished()
        return list(complete_steps(self.directory))

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the best metric, or None if none was measured."""
        self.wait_until_finished()
        manifests = complete_steps(self.directory)
        metrics = {step: recorded_metrics(manifest) for step, manifest in manifests.items()}
        return best_step(metrics, self._metric, lower_is_better=self._lower_is_better)

    def has_started(self) -> bool:
        """Whether a run in this folder may have taken a training step."""
        self.wait_until_finished()
        return has_started(self.directory)

    def close(self) -> None:
        """Wait for the last save and release Orbax's threads.

        Raises:
            CheckpointSaveError: the last save failed.
        """
        try:
            self.wait_until_finished()
        finally:
            self._worker.shutdown()
            manager, self._manager = self._manager, None
            if manager is not None:
                try:
                    manager.close()
                except Exception:
                    if not self._failed:  # otherwise it repeats an error already raised
                        raise

    def __enter__(self) -> "TrainCheckpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and jax.process_count() > 1:
            # The others may be elsewhere: to wait for them would hide the error from them.
            self._worker.shutdown(wait=False)
            return
        self.close()

    def _delete_old(self) -> None:
        """Delete steps that need not be kept, now that the newest is sealed."""
        newest = sorted(self._metrics)[-self._keep :]
        best = best_step(self._metrics, self._metric, lower_is_better=self._lower_is_better)
        kept = {*newest, best}
        self._metrics = {step: seen for step, seen in self._metrics.items() if step in kept}
        if jax.process_index() == 0:
            for step in committed_steps(self.directory):
                if step not in kept:
                    delete_step(self.directory, step)

    def _open(self, step: int) -> ocp.CheckpointManager:
        """Remove rejected steps, check for conflicting ones, and start Orbax's manager."""
        if jax.process_index() == 0:
            self._clear_rejected()
        _barrier("checkpoint_cleared")
        existing = committed_steps(self.directory)
        if self._newest is None and existing:
            raise FileExistsError(
                f"{self.directory} has checkpoints of steps {existing}: resume that run "
                "(--resume), or choose another run_dir"
            )
        if newer := [other for other in existing if other >= step]:
            raise FileExistsError(
                f"{self.directory} has checkpoints of steps {newer}, not older than step {step} "
                f"after a restore of step {self._newest}: a run resumes only from its newest "
                "checkpoint; choose another run_dir"
            )
        manifests = complete_steps(self.directory)
        self._metrics = {seen: recorded_metrics(manifest) for seen, manifest in manifests.items()}
        return ocp.CheckpointManager(
            self.directory,
            # Without a limit it keeps every step: we decide what is deleted, and when.
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                async_options=ocp.AsyncOptions(timeout_secs=self._timeout),
            ),
        )

    def _clear_rejected(self) -> None:
        """Make room for steps that will be written again."""
        rejected = [one.step for one in self._rejected]
        if not has_started(self.directory):
            rejected = committed_steps(self.directory)  # at most an unfinished step 0
        for step in rejected:
            folder = self.directory / str(step)
            if not folder.exists():
                continue  # a temporary folder, which Orbax's manager removes when it starts
            if (folder / MANIFEST_NAME).exists():
                logger.warning("step %d is set aside as %s", step, set_aside(self.directory, step))
            else:
                folder.rmtree()

    def _seal(
        self,
        manager: ocp.CheckpointManager,
        step: int,
        metrics: dict[str, float],
        left_out: Sequence[str],
    ) -> None:
        """Wait until a step is committed, then write its manifest; runs in the worker thread."""
        manager.wait_until_finished()
        about = self._about(step, metrics, left_out)
        seal_step(self.directory / str(step), about, timeout=self._timeout)
        self._metrics[step] = metrics
        self._delete_old()

    def _save_error(self, step: int | None, error: Exception) -> CheckpointSaveError:
        """What a failed save comes to; an Orbax error ends with the operating system's reason."""
        system = re.search(r": ([^:]+) \[os_error_code=", str(error))
        lines = str(error).splitlines() or [type(error).__name__]
        reason = system[1] if system else lines[0][:300]
        left = list(complete_steps(self.directory))
        return CheckpointSaveError(
            f"step {step} could not be saved in {self.directory}: {reason}; "
            + (f"intact checkpoints: steps {left}" if left else "there is no intact checkpoint")
            + "; free some disk space if needed, and resume"
        )

    def _about(
        self, step: int, metrics: dict[str, float], left_out: Sequence[str]
    ) -> dict[str, Any]:
        """What a step's manifest records besides the hashes."""
        best_by = {"metric": self._metric, "lower_is_better": self._lower_is_better}
        about = {"step": step, "metrics": metrics, "best_by": best_by}
        return about | ({"left_out": list(left_out)} if left_out else {})


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
