"""The training run: check, prepare, train, evaluate, save, resume.

In: a `TrainConfig`. Out: `TrainResult`, and the run directory with config, metrics, checkpoints and
the final value folder.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from etils import epath

from ivl_jax.checkpoint import TrainCheckpointer
from ivl_jax.compilation_cache import use_compilation_cache
from ivl_jax.config import (
    ConfigError,
    TrainConfig,
    check_train_config,
    train_config_of,
    unused_options,
)
from ivl_jax.devices import unused_accelerator
from ivl_jax.paths import usable_path
from ivl_jax.processes import joined_processes
from ivl_jax.training.interrupts import Interrupts
from ivl_jax.training.limits import check_batch, check_disk, disk_use
from ivl_jax.training.models import choose_models
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.output import report_best, save_output
from ivl_jax.training.rollouts import MakeRollouts
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.setup import (
    Data,
    cache_base_states,
    check_names,
    make_run_mesh,
    prepare,
    prepare_data,
    state_shapes,
)
from ivl_jax.training.trainer import Trainer
from ivl_jax.training.used_weights import fingerprint_weights

logger = logging.getLogger(__name__)

CheckData = Callable[[Data], None]


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


def run(
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any],
    *,
    make_rollouts: MakeRollouts | None = None,
    check_data: CheckData | None = None,
) -> TrainResult:
    """Train a value network, or fine-tune a model by itself, according to a config.

    Args:
        config: of the run, the path of its TOML file, or a mapping with the file's content.
        make_rollouts: samples answers, for an objective that learns from them; see
            `ivl_jax.post_training.run`, which has one.
        check_data: looks at the run's data before any weight is read, and raises an error if they
            cannot be used; None: no further check.

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
    for problem in unused_options(config):
        logger.warning("%s", problem)
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
        return _run(
            config, directory, there=there, make_rollouts=make_rollouts, check_data=check_data
        )


def _run(
    config: TrainConfig,
    directory: RunDirectory,
    *,
    there: bool,
    make_rollouts: MakeRollouts | None,
    check_data: CheckData | None,
) -> TrainResult:
    """Train in a run directory that no other process writes to."""
    check_names(config)
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    check_batch(config, models.arch, mesh)
    weights = fingerprint_weights(config, models)
    directory.check_weights(weights.records)
    data = prepare_data(config, models, mesh)
    if check_data is not None:
        check_data(data)
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
            lower_is_better=objective.best_is == "lowest",
            timeout=config.processes.barrier_timeout,
        ) as checkpoints:
            rollouts = make_rollouts and make_rollouts(config, prepared, weights, directory)
            trainer = Trainer(
                config, directory, prepared, weights, checkpoints, interrupts, rollouts
            )
            state, evaluation, interrupted = trainer.fit()
            best = checkpoints.best_step()
        output = None
        if not interrupted:
            output = save_output(config, directory, prepared, weights, state)
            report_best(config, directory, objective, best=best, last=int(state.step))
    return TrainResult(
        run_dir=directory.path,
        steps=int(state.step),
        total_steps=data.total_steps,
        held_out=evaluation.mean if evaluation else None,
        held_out_by_base=evaluation.by_base if evaluation else {},
        output=output,
        interrupted=interrupted is not None,
    )
