"""One start of a run: takes steps until the last one, or until a signal or an error ends it.

In: a prepared run. Out: the state and the last evaluation. Whatever ends a start early, a signal
while answers are sampled or a reward function that raises, the steps already taken are saved first.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ivl_jax.checkpoint import TrainCheckpointer, write_value_description
from ivl_jax.compilation_cache import describe_compiling
from ivl_jax.config import TrainConfig
from ivl_jax.data.batching import Batch
from ivl_jax.profiling import StepProfile
from ivl_jax.sharding import place_batch
from ivl_jax.training.evaluation import Evaluation
from ivl_jax.training.interrupts import Interrupts
from ivl_jax.training.output import value_metadata
from ivl_jax.training.programs import BaseProgram
from ivl_jax.training.reporting import Reporter
from ivl_jax.training.rollouts import (
    Rollouts,
    SamplingProgress,
    SamplingStoppedError,
    Watch,
)
from ivl_jax.training.run_directory import RunDirectory, RunDirectoryError
from ivl_jax.training.setup import Preparation
from ivl_jax.training.step import StepMetrics, TrainState, split_micro_batches
from ivl_jax.training.used_weights import UsedWeights

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became inf or NaN: which step, which rows; that step was not saved."""


class Trainer:
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
        """Store the parts of a run.

        Args:
            config: of the run.
            directory: its run directory.
            prepared: its data, models and programs.
            weights: fingerprints of the weights it reads.
            checkpoints: where it is saved.
            interrupts: the signals received.
            rollouts: samples answers; None: the objective learns from those of the rows.
        """
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
        self._evaluated_step = -1
        """The step that this start has last evaluated."""
        self._fresh = True
        """Whether step 0 must still be evaluated and saved; a run may also resume from step 0."""
        self._evaluated = True
        """Whether the newest checkpoint has the evaluation that its step asks for."""

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
                trackers=self._config.logging.trackers,
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
                self._evaluate(step, state, report)
                if self._evaluated_step == step and self._evaluation is not None:
                    self._checkpoints.record_metrics(self._evaluation.mean)
            stop_signal = self._interrupts.requested(step)
            waiting = None
            batch, sampled = None, {}
            while step < self._total and stop_signal is None:
                program = self._prepared.programs[self._prepared.turns(step // self._updates)]
                if step % self._updates == 0:
                    if self._rollouts is not None:
                        # Sampling waits for this step's parameters in any case.
                        self._settle(waiting, report)
                        waiting = None
                    drawn = self._next_batch(program, state, step, report)
                    if drawn is None:
                        stop_signal = self._interrupts.requested(step)
                        break
                    batch, sampled = drawn
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
                    if stop_signal is None or step == self._total:
                        self._evaluate(step, state, report)
                        if self._rollouts is not None:
                            stop_signal = self._interrupts.requested(step)
                    if self._is_checkpoint(step) or stop_signal is not None:
                        self._save(state)
                        report.copy_events()
        if stop_signal is not None and (step < self._total or not self._evaluated):
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
        self, program: BaseProgram, state: TrainState, step: int, report: Reporter
    ) -> tuple[Batch, Mapping[str, float]] | None:
        """The batch that follows, on the devices, and figures of the answers that it holds.

        None: a signal ended the sampling of its answers, and the state is saved as before it.
        """
        batches, sampled, figures = self._prepared.data.train, None, {}
        if self._rollouts is not None:
            asked = batches.demonstrations(step // self._updates)
            jax.block_until_ready(state.params)
            try:
                with report.sampling(f"sampling for step {step + 1}") as show:
                    watch = self._watch(step, show)
                    sampled, figures = self._rollouts.batch(
                        state.params, step, asked, program, watch=watch
                    )
            except SamplingStoppedError:
                self._save(state)
                return None
            except Exception:
                self._save_after_error(state)
                raise
        given = next(batches)
        batch = given if sampled is None else sampled
        batch = split_micro_batches(batch, self._config.step.micro_batches)
        batch = place_batch(batch, self._prepared.mesh, micro_batched=True)
        if self._updates > 1:
            scores = program.first_pass(state.params, program.base_params, batch)
            batch = batch._replace(sampled_log_probs=scores["log_prob"])
        return batch, figures

    def _watch(self, step: int, show: Watch) -> Watch:
        """Shows how far sampling has come, and ends it once a signal was received."""

        def watch(progress: SamplingProgress) -> None:
            if self._interrupts.requested(step) is not None:
                raise SamplingStoppedError
            show(progress)

        return watch

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
        self._evaluate(0, state, report)
        self._save(state)
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
        """Whether held-out rows are evaluated after this step."""
        if not self._prepared.data.held_out:
            return False
        every = self._config.logging.evaluate_every
        return step in (0, self._total) or bool(every and step % every == 0)

    def _evaluate(self, step: int, state: TrainState, report: Reporter) -> None:
        """Evaluate if it is due; if rewards fail, what has been trained is saved first."""
        if not self._is_evaluation(step):
            return
        try:
            figures = self._figures(step, state, report)
        except SamplingStoppedError:
            return  # the resume evaluates this step
        except Exception:
            # Of several processes only one may have failed, and a save needs all of them; answers
            # are sampled in one.
            if self._rollouts is not None:
                self._save_after_error(state)
            raise
        self._evaluation = Evaluation.of(figures, self._prepared.turns.weights)
        self._evaluated_step, self._evaluated = step, True
        report.evaluation(step, self._evaluation)

    def _figures(
        self, step: int, state: TrainState, report: Reporter
    ) -> dict[str, dict[str, float]]:
        """The held-out figures of each base."""
        held_out = {one.name: one.held_out for one in self._prepared.programs if one.held_out}
        with report.aside("evaluating", sum(one.count for one in held_out.values())) as advance:
            figures = {name: one(state.params, advance=advance) for name, one in held_out.items()}
            if self._rollouts is not None:
                for one in self._prepared.programs:
                    with report.sampling("answering held-out prompts", counted=False) as show:
                        figures[one.name] |= self._rollouts.evaluate(
                            state.params,
                            self._prepared.data.held_out_demonstrations(),
                            one,
                            watch=self._watch(step, show),
                        )
        return figures

    def _save_after_error(self, state: TrainState) -> None:
        """Save the steps taken before an error that is about to be raised."""
        try:
            self._save(state)
            self._checkpoints.wait_until_finished()
        except Exception as error:  # the first error is the one to see
            logger.error("step %d could not be saved: %s", int(state.step), error)
            return
        logger.error(
            "an error ended the run after step %d/%d, which is saved; once it is fixed, resume "
            "with:\n  %s",
            int(state.step),
            self._total,
            self._directory.resume_command,
        )

    def _save(self, state: TrainState) -> None:
        if not bool(_all_finite(state.params)):
            raise NonFiniteLossError(
                f"step {int(state.step)}: a parameter is inf or NaN; this step is not saved. The "
                f"last good checkpoint is step {self._checkpoints.latest_step()}"
            )
        step = int(state.step)
        measured = self._evaluation if self._evaluated_step == step else None
        evaluated = measured is not None or not self._is_evaluation(step)
        saved = self._checkpoints.save(
            state,
            data_state=self._prepared.data.train.get_state(),
            run_metadata={
                "metrics_bytes": self._directory.metrics.flush(),
                "evaluation": self._evaluation and self._evaluation.to_json(),
                "evaluated": evaluated,
            },
            metrics=measured and measured.mean,
            # Before the first step the optimizer's state follows from the parameters.
            leave_out=() if step else ("opt_state",),
        )
        if saved:
            self._evaluated = evaluated
        self._directory.timings.flush()
        if self._rollouts is not None:
            self._directory.samples.flush()


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(finite))
