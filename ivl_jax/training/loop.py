"""The training run: check, prepare, train, evaluate, save, resume.

In: a `TrainConfig`. Out: `TrainResult`, and the run directory with config, metrics, checkpoints and
the final value folder.
"""

import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from ivl_jax.checkpoint import TrainCheckpointer, write_value_description
from ivl_jax.compilation_cache import describe_compiling, use_compilation_cache
from ivl_jax.config import ConfigError, TrainConfig, check_train_config, train_config_of
from ivl_jax.data.batching import Batch
from ivl_jax.devices import unused_accelerator
from ivl_jax.paths import usable_path
from ivl_jax.processes import joined_processes
from ivl_jax.profiling import StepProfile
from ivl_jax.sharding import place_batch
from ivl_jax.training.evaluation import Evaluation
from ivl_jax.training.interrupts import Interrupts
from ivl_jax.training.limits import check_batch, check_disk, disk_use
from ivl_jax.training.models import choose_models
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.output import report_best, save_output, value_metadata
from ivl_jax.training.programs import BaseProgram
from ivl_jax.training.reporting import Reporter
from ivl_jax.training.rollouts import MakeRollouts, Rollouts
from ivl_jax.training.run_directory import RunDirectory, RunDirectoryError
from ivl_jax.training.setup import (
    Preparation,
    cache_base_states,
    check_names,
    make_run_mesh,
    prepare,
    prepare_data,
    state_shapes,
)
from ivl_jax.training.step import StepMetrics, TrainState, split_micro_batches
from ivl_jax.training.used_weights import UsedWeights, fingerprint_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    run_dir: epath.Path
    steps: int
    """Optimizer steps taken, over all starts."""
    total_steps: int
    """Steps of the whole run."""
    held_out: Mapping[str, float] | None
    """The last evaluation: `nll`, `accuracy`, `tokens`; with a base also `base_nll`,
    `base_accuracy`, `mean_abs_value`. With several bases, the mean weighted by their weights. None
    without held-out demonstrations."""
    held_out_by_base: Mapping[str, Mapping[str, float]]
    """With several bases: each base's figures, by its path; else empty."""
    output: epath.Path | None
    """The value folder, or with `method = "sft"` the model folder; None after an interruption."""
    interrupted: bool
    """Whether SIGTERM, SIGHUP or Ctrl-C stopped the run; the state is saved."""


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became inf or NaN: which step, which rows; that step was not saved."""


def run(
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any],
    *,
    make_rollouts: MakeRollouts | None = None,
) -> TrainResult:
    """Train a value network, or fine-tune a model by itself, according to a config.

    Args:
        config: of the run, the path of its TOML file, or a mapping with the file's content.
        make_rollouts: samples answers, for an objective that learns from them; see
            `ivl_jax.post_training.run`, which has one.

    Returns:
        The result.

    Raises:
        TypeError: the config is of another type.
        ConfigError: the config cannot work; raised before anything expensive.
        RunDirectoryError: the run directory cannot be used, for example because it exists and
            `resume` is not set.
        NoUsableCheckpointError: `resume` is set, but no checkpoint is intact.
        NonFiniteLossError: the loss or a gradient became inf or NaN.
    """
    config = train_config_of(config)
    check_train_config(config)
    if find_objective(config).sampling is None:
        make_rollouts = None
    elif make_rollouts is None:
        raise ConfigError(
            f'objective = "{config.objective}" samples answers, which training alone cannot: call '
            "ivl_jax.post_training.run, or use train.py"
        )
    directory = RunDirectory(config.run_dir)
    usable_path(config.data.data_dir)
    with ExitStack() as stack:
        if config.distributed:
            remedy = f"when all are gone, resume on every host: {directory.resume_command}"
            stack.enter_context(joined_processes(config.processes, remedy=remedy))
        use_compilation_cache(config.runtime.compilation_cache)
        if (notice := unused_accelerator()) is not None:
            logger.warning(notice)
        there = stack.enter_context(directory.claim(config))
        return _run(config, directory, there=there, make_rollouts=make_rollouts)


def _run(
    config: TrainConfig,
    directory: RunDirectory,
    *,
    there: bool,
    make_rollouts: MakeRollouts | None,
) -> TrainResult:
    """Train in a run directory that no other process writes to."""
    check_names(config)
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    check_batch(config, models.arch, mesh)
    weights = fingerprint_weights(config, models)
    directory.check_weights(weights.records)
    data = prepare_data(config, models, mesh)
    state = state_shapes(config, models, mesh)
    check_disk(disk_use(config.logging, state, total_steps=data.total_steps), directory.path)
    cache_base_states(config, models, data, mesh)
    directory.open(config, there=there, weights=weights.records)
    with Interrupts() as interrupts:
        prepared = prepare(config, models, data, mesh)
        keep = config.logging.keep_checkpoints
        objective = prepared.objective
        with TrainCheckpointer(
            directory.checkpoints,
            keep=keep,
            metric=objective.best_by,
            timeout=config.processes.barrier_timeout,
        ) as checkpoints:
            rollouts = make_rollouts and make_rollouts(config, prepared, weights, directory)
            training = _Training(
                config, directory, prepared, weights, checkpoints, interrupts, rollouts
            )
            state, evaluation, interrupted = training.fit()
            best = checkpoints.best_step()
        output = None
        if not interrupted:
            output = save_output(config, directory, prepared, weights, state)
            report_best(config, directory, objective.best_by, best=best, last=int(state.step))
    return TrainResult(
        run_dir=directory.path,
        steps=int(state.step),
        total_steps=data.total_steps,
        held_out=evaluation.mean if evaluation else None,
        held_out_by_base=evaluation.by_base if evaluation else {},
        output=output,
        interrupted=interrupted is not None,
    )


class _Training:
    """One start of a run, from its first or restored step to the last."""

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        prepared: Preparation,
        weights: UsedWeights,
        checkpoints: TrainCheckpointer,
        interrupts: Interrupts,
        rollouts: Rollouts | None,
    ) -> None:
        self._config = config
        self._directory = directory
        self._prepared = prepared
        self._weights = weights
        self._checkpoints = checkpoints
        self._interrupts = interrupts
        self._rollouts = rollouts
        self._total = prepared.data.total_steps
        self._updates = prepared.objective.updates
        """Steps per batch."""
        self._evaluation: Evaluation | None = None
        self._fresh = True
        """Whether step 0 must still be evaluated and saved; a run may also resume from step 0."""
        self._evaluated = True
        """Whether the restored step had been evaluated before the stop."""

    def fit(self) -> tuple[TrainState, Evaluation | None, str | None]:
        """Train until the last step or a signal.

        Returns:
            The state, the last evaluation, and the name of the signal that stopped it, or None.
        """
        state = self._begin()
        step = int(state.step)
        logger.info(describe_compiling())
        with (
            Reporter(
                self._directory,
                first_step=step,
                total_steps=self._total,
                shown=self._prepared.objective.shown,
            ) as report,
            StepProfile(self._config.profile, first_step=step, name="train") as profile,
        ):
            if self._fresh:
                self._start(state, report)
            elif not self._evaluated:
                # A signal had left no time for it; so metrics.jsonl and the best step stay the same
                # as without a stop.
                evaluation = self._evaluate(step, state, report)
                if evaluation is not None:
                    self._checkpoints.record_metrics(evaluation.mean)
            stop_signal = self._interrupts.requested(step)
            waiting = None
            batch, sampled = None, {}
            while step < self._total and stop_signal is None:
                program = self._prepared.programs[self._prepared.turns(step // self._updates)]
                if step % self._updates == 0:
                    batch, sampled = self._next_batch(program, state, step)
                with profile.step(step, waiting):
                    state, metrics = program.step(state, program.base_params, batch)
                metrics |= {name: jnp.float32(value) for name, value in sampled.items()}
                step += 1
                # The device computes this step while the host reads the last one's figures.
                self._settle(waiting, report)
                waiting = (step, metrics)
                if step % self._updates == 0:  # sampled answers are not saved
                    stop_signal = self._interrupts.requested(step)
                if self._is_boundary(step) or stop_signal is not None:
                    self._settle(waiting, report)
                    waiting = None
                    # Only seconds may be left after a signal: the evaluation waits for the resume.
                    finished = stop_signal is None or step == self._total
                    evaluation = self._evaluate(step, state, report) if finished else None
                    if self._is_checkpoint(step) or stop_signal is not None:
                        self._save(state, evaluation)
                        report.copy_events()
        if stop_signal is not None and step < self._total:
            self._checkpoints.wait_until_finished()
            logger.warning(
                "stopped by %s after step %d/%d, which is saved; resume with:\n  %s",
                stop_signal,
                step,
                self._total,
                self._directory.resume_command,
            )
            return state, self._evaluation, stop_signal
        return state, self._evaluation, None

    def _next_batch(
        self, program: BaseProgram, state: TrainState, step: int
    ) -> tuple[Batch, Mapping[str, float]]:
        """The batch that follows, on the devices, and figures of the answers that it holds."""
        batches, figures = self._prepared.data.train, {}
        batch = next(batches)
        if self._rollouts is not None:
            asked = batches.demonstrations(step // self._updates)
            batch, figures = self._rollouts.batch(state.params, step, asked, program)
        batch = split_micro_batches(batch, self._config.step.micro_batches)
        batch = place_batch(batch, self._prepared.mesh, micro_batched=True)
        if self._updates > 1:
            scores = program.first_pass(state.params, program.base_params, batch)
            batch = batch._replace(sampled_log_probs=scores["log_prob"])
        return batch, figures

    def _begin(self) -> TrainState:
        """Restore the newest intact checkpoint, or make the state of step 0."""
        metrics = self._directory.metrics
        if self._config.resume and self._checkpoints.has_started():
            restored = self._checkpoints.restore(
                self._prepared.abstract_state,
                # Steps whose records a power failure lost are computed again.
                fits=lambda run: metrics.missing_records(run["metrics_bytes"]),
                fill=lambda kept: self._prepared.state_from(kept.params),
            )
            self._prepared.data.train.set_state(restored.data_state)
            metrics.cut(restored.run_metadata["metrics_bytes"])
            self._evaluation = Evaluation.from_json(restored.run_metadata["evaluation"])
            self._evaluated = restored.run_metadata["evaluated"]
            self._fresh = False
            logger.info("resuming from step %d/%d", restored.step, self._total)
            return restored.state
        if metrics.last_step() > 0:
            raise RunDirectoryError(
                f"{metrics.path} records {metrics.last_step()} steps, but "
                f"{self._directory.checkpoints} has no checkpoint to resume from: restore the "
                "checkpoints, or choose another run_dir to start over"
            )
        if self._config.resume:
            logger.warning("nothing was saved before the stop: starting at step 0")
        metrics.cut(0)
        return self._prepared.make_state()

    def _start(self, state: TrainState, report: Reporter) -> None:
        """Evaluate and save step 0; training begins once it is on disk."""
        if self._config.method == "value":
            write_value_description(
                self._directory.path,
                metadata=value_metadata(self._config, self._prepared, self._weights, steps=0),
                tokenizer=self._prepared.models.trained.tokenizer,
            )
        self._save(state, self._evaluate(0, state, report))
        self._checkpoints.wait_until_finished()

    def _settle(self, waiting: tuple[int, StepMetrics] | None, report: Reporter) -> None:
        """Read and check the figures of a step; waits until the device has finished it."""
        if waiting is None:
            return
        step, metrics = waiting
        figures = {name: float(x) for name, x in jax.device_get(metrics).items()}
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            self._stop_at_non_finite(step, figures, bad)
        every = self._config.logging.log_every
        name = ""
        if len(self._prepared.programs) > 1:
            batch = (step - 1) // self._updates
            name = self._prepared.programs[self._prepared.turns(batch)].name
        record = step % every == 0 or step in (1, self._total)
        report.step(step, figures, base=name, record=record)

    def _stop_at_non_finite(self, step: int, figures: Mapping[str, float], bad: list[str]) -> None:
        self._checkpoints.wait_until_finished()
        # Step n is computed from batch n − 1, if there is one step per batch.
        rows = self._prepared.data.train.row_ids((step - 1) // self._updates)
        named = "\n".join(f"  row {i}: {', '.join(ids)}" for i, ids in enumerate(rows) if ids)
        values = ", ".join(f"{name} = {figures[name]}" for name in bad)
        raise NonFiniteLossError(
            f"step {step}: {values}. This step was not saved; the last good checkpoint is step "
            f"{self._checkpoints.latest_step()}. Demonstrations in its batch (process "
            f"{jax.process_index()}):\n{named}\nThe usual remedies are a lower "
            "optimizer.learning_rate, a longer optimizer.warmup_fraction or float32 compute"
        )

    def _is_boundary(self, step: int) -> bool:
        return self._is_checkpoint(step) or self._is_evaluation(step)

    def _is_checkpoint(self, step: int) -> bool:
        return step % self._config.logging.checkpoint_every == 0 or step == self._total

    def _is_evaluation(self, step: int) -> bool:
        every = self._config.logging.evaluate_every
        return step in (0, self._total) or bool(every and step % every == 0)

    def _evaluate(self, step: int, state: TrainState, report: Reporter) -> Evaluation | None:
        if not self._prepared.data.held_out or not self._is_evaluation(step):
            return None
        held_out = {one.name: one.held_out for one in self._prepared.programs if one.held_out}
        with report.aside("evaluating", sum(one.count for one in held_out.values())) as advance:
            figures = {name: one(state.params, advance=advance) for name, one in held_out.items()}
            if self._rollouts is not None:
                asked = self._prepared.data.held_out_demonstrations()
                for one in self._prepared.programs:
                    figures[one.name] |= self._rollouts.evaluate(state.params, asked, one)
        self._evaluation = Evaluation.of(figures, self._prepared.turns.weights)
        report.evaluation(step, self._evaluation)
        return self._evaluation

    def _save(self, state: TrainState, evaluation: Evaluation | None) -> None:
        if not bool(_all_finite(state.params)):
            raise NonFiniteLossError(
                f"step {int(state.step)}: a parameter is inf or NaN; this step is not saved. The "
                f"last good checkpoint is step {self._checkpoints.latest_step()}"
            )
        self._checkpoints.save(
            state,
            data_state=self._prepared.data.train.get_state(),
            run_metadata={
                "metrics_bytes": self._directory.metrics.flush(),
                "evaluation": self._evaluation and self._evaluation.to_json(),
                "evaluated": evaluation is not None or not self._is_evaluation(int(state.step)),
            },
            metrics=evaluation and evaluation.mean,
            # Before the first step the optimizer's state follows from the parameters.
            leave_out=() if int(state.step) else ("opt_state",),
        )
        self._directory.timings.flush()
        if self._rollouts is not None:
            self._directory.samples.flush()


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(finite))
