"""From a config to everything a run needs: data, models, objective, compiled steps.

In: a config. Out: `Preparation`. Cheap checks come first; weights are read last.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ivl_jax.config import ConfigError, DataConfig, TrainConfig
from ivl_jax.data.batching import EvalBatches, TrainIterator, make_eval_batches, make_train_iterator
from ivl_jax.data.chat import ChatFormat, make_chat_format
from ivl_jax.data.demonstrations import DemonstrationSource, store_demonstrations
from ivl_jax.data.formats import FORMATS, Demonstration
from ivl_jax.data.tokenized import TokenizedDemonstrations, tokenize_demonstrations
from ivl_jax.model.decoder import Params
from ivl_jax.sharding import batch_ways, data_shard, make_mesh
from ivl_jax.training.adapter import load_frozen, make_adapter, place_adapter
from ivl_jax.training.base_turns import BaseTurns
from ivl_jax.training.cached_states import CachedSplit, open_cached_splits, write_cached_states
from ivl_jax.training.models import Models, Placement, make_trained_params, place_model
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.objectives.objective import Objective
from ivl_jax.training.optimizer import (
    Schedules,
    make_optimizer,
    make_penalty_schedule,
    make_schedule,
)
from ivl_jax.training.programs import BaseProgram, build_programs
from ivl_jax.training.sampling import check_sampling, choose_prompts
from ivl_jax.training.step import TrainState, abstract_state, init_state, state_shardings
from ivl_jax.training.trackers import check_trackers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on, and the chat format of their text."""

    train: TrainIterator
    held_out: tuple[EvalBatches, ...]
    """The same demonstrations for each base; empty when none are held out."""
    chat_format: ChatFormat
    total_steps: int
    cached: tuple[dict[str, CachedSplit], ...]
    """For each base its cached states by split; empty if it runs at every step."""

    def held_out_demonstrations(self) -> list[Demonstration]:
        """The demonstrations that an evaluation reads."""
        if not self.held_out:
            return []
        batches = self.held_out[0]
        return [one for index in range(len(batches)) for one in batches.demonstrations(index)]


@dataclass(frozen=True)
class Preparation:
    """Everything a run needs once its weights have been read."""

    mesh: Mesh
    models: Models
    objective: Objective
    data: Data
    programs: tuple[BaseProgram, ...]
    """One per base; a single one without a base if a model is trained alone."""
    turns: BaseTurns
    """Batch number → index into `programs`."""
    abstract_state: TrainState
    make_state: Callable[[], TrainState]
    """Reads or makes the trained parameters; not called when a checkpoint is restored."""
    frozen: Params | None
    """The trained network's frozen parameters, if only an adapter is trained."""
    state_from: Callable[[Params], TrainState]
    """The state of step 0 around given parameters, which are donated."""


def check_names(config: TrainConfig) -> None:
    """Look up what the config gives by name, before anything is read.

    Raises:
        ValueError: an unknown objective or row format, or templates where none are read.
        ConfigError: an objective that does not learn from such rows, or needs a teacher; or a
            teacher or augmentation for an objective that has none; or as `check_trackers`.
    """
    check_trackers(config.logging.trackers)
    objective, row_format = find_objective(config), _source(config.data).format
    if objective.needs_teacher != bool(config.distil.teacher):
        raise ConfigError(
            f'objective = "{config.objective}" learns from a teacher: name its folder or hub id as '
            "distil.teacher"
            if objective.needs_teacher
            else f'distil.teacher = "{config.distil.teacher}" cannot be combined with objective = '
            f'"{config.objective}", which has no teacher: set objective = "distil"'
        )
    varied = config.augmentation.shown
    if varied and not objective.takes_augmentation:
        raise ConfigError(
            f'{varied} cannot be combined with objective = "{config.objective}", which compares '
            "with the base or a teacher, or samples from the composed model: leave them at 1 and "
            '0, or set objective = "sft"'
        )
    if objective.sampling is not None:
        check_sampling(config, objective.sampling)
    in_pairs = row_format.read_rejected is not None
    if in_pairs != (objective.dialogues == 2):
        expected = "preferences" if objective.dialogues == 2 else "demonstrations"
        fitting = [
            f'"{name}"' for name, one in FORMATS.items() if (one.read_rejected is None) == in_pairs
        ]
        raise ConfigError(
            f'data.format = "{row_format.name}" and objective = "{config.objective}" do not go '
            f"together: the objective learns from {expected}, which data.format = "
            f"{' or '.join(fitting)} reads"
        )


def make_run_mesh(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh and check that the batch divides evenly over it.

    Args:
        config: of the run.
        devices: the devices to use, which need not be attached; None: all of `jax.devices()`.

    Returns:
        The mesh.

    Raises:
        ConfigError: the mesh does not fit the devices, or the batch does not divide evenly.
    """
    try:
        sizes = config.mesh
        mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, devices=devices)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from error
    rows, ways = config.step.batch_size // config.step.micro_batches, batch_ways(mesh)
    if rows % ways:
        raise ConfigError(
            f"step.batch_size / step.micro_batches = {rows} rows do not divide evenly over data × "
            f"fsdp = {ways} devices: make it a multiple of {ways}, or set mesh.tensor"
        )
    return mesh


def prepare_data(config: TrainConfig, models: Models, mesh: Mesh) -> Data:
    """Store, tokenise and batch the demonstrations.

    Args:
        config: of the run.
        models: from `choose_models`; the trained model's tokenizer is used.
        mesh: decides which rows this process reads.

    Returns:
        The data of the run.

    Raises:
        ConfigError: no prompt leaves room for an answer.
        MalformedRowsError: too many rows are malformed.
        StatesError: cached base states are stale.
    """
    options = config.data
    info = models.trained.info
    chat_format = make_chat_format(models.trained.tokenizer, template=options.chat_template)
    # Every process does this by itself: hosts may have separate disks, and on a shared one they all
    # write the same.
    stored = store_demonstrations(
        _source(options),
        data_dir=options.data_dir,
        max_malformed_share=options.rows.max_malformed_fraction,
        resuming=config.resume,
    )
    split: dict[str, TokenizedDemonstrations] = {
        name: tokenize_demonstrations(
            stored.open(name),
            chat_format,
            sequence_length=options.max_length,
            cache_dir=options.data_dir,
            max_malformed_share=options.rows.max_malformed_fraction,
        )
        for name in ("train", "validation")
        if stored.counts.get(name)
    }
    index, count = data_shard(mesh)
    batch_options: dict[str, Any] = {
        "pad_id": info.pad_id,
        "packing": options.packing,
        "process_index": index,
        "process_count": count,
    }
    cached: list[dict[str, CachedSplit]] = [
        open_cached_splits(config, base, split, chat_format, data_name=stored.folder.parent.name)
        for base in models.bases
    ] or [{}]
    rows = config.step.batch_size
    # Each prompt of a step is answered by a group of rows.
    objective = find_objective(config)
    sampling = objective.sampling
    answered: dict[str, Any] = {}
    if sampling is not None:
        # On held-out rows an objective without rewards is evaluated on the given answers.
        answered = {
            name: choose_prompts(config, models, sampling, one, chat_format)
            for name, one in split.items()
            if name == "train" or sampling.rewarded
        }

    def of_split(name: str) -> dict[str, Any]:
        if name not in answered:
            return batch_options
        return batch_options | {"packing": False, "only": answered[name]}

    train = make_train_iterator(
        split["train"],
        batch_size=rows if sampling is None else rows // sampling.group_size,
        seed=config.seed,
        states=[one["train"].states if one else None for one in cached],
        turns=base_turns(config),
        **of_split("train"),
    )
    held_out = []
    if "validation" in split:
        held_out = [
            make_eval_batches(
                split["validation"],
                batch_size=rows // config.step.micro_batches,
                max_rows=config.logging.evaluation_rows,
                states=one["validation"].states if one else None,
                **of_split("validation"),
            )
            for one in cached
        ]
    else:
        logger.warning("no held-out demonstrations: data.validation_fraction is 0; no evaluation")
    batches = max(1, round(config.step.epochs * train.steps_per_epoch))
    steps = config.step.max_steps or batches * objective.updates
    return Data(train, tuple(held_out), chat_format, steps, tuple(cached))


def cache_base_states(config: TrainConfig, models: Models, data: Data, mesh: Mesh) -> None:
    """Run each base with cached states over the dialogues whose states are not on disk yet.

    Args:
        config: of the run.
        models: from `choose_models`.
        data: from `prepare_data`.
        mesh: the device mesh.

    Raises:
        OSError: there is not enough disk space.
    """
    pad_id = models.trained.info.pad_id
    for base, cached in zip(models.bases, data.cached, strict=False):
        if cached:
            write_cached_states(config, base, list(cached.values()), pad_id=pad_id, mesh=mesh)


def state_shapes(config: TrainConfig, models: Models, mesh: Mesh) -> TrainState:
    """Describe the train state of a run by shape and dtype; allocates nothing.

    Args:
        config: of the run.
        models: from `choose_models`.
        mesh: the device mesh; vocabulary rows are padded to divide over it.

    Returns:
        A `TrainState` of `ShapeDtypeStruct`s.
    """
    place = place_trained(config, models, mesh)
    _, optimizer = make_run_optimizer(config, total_steps=1)
    key = jax.random.key(config.seed)
    shardings = state_shardings(place.shapes, place.shardings, optimizer, mesh)
    return abstract_state(place.shapes, optimizer, key, shardings)


def prepare(config: TrainConfig, models: Models, data: Data, mesh: Mesh) -> Preparation:
    """Read the bases' weights and build the programs of a run.

    Args:
        config: of the run.
        models: from `choose_models`.
        data: from `prepare_data`.
        mesh: the device mesh.

    Returns:
        Everything but the state.
    """
    place = place_trained(config, models, mesh)
    schedules, optimizer = make_run_optimizer(config, data.total_steps)
    shardings = state_shardings(place.shapes, place.shardings, optimizer, mesh)
    key = jax.random.key(config.seed)
    frozen = load_frozen(config, models, mesh)
    programs = build_programs(
        config,
        models,
        place,
        optimizer=optimizer,
        schedules=schedules,
        shardings=shardings,
        held_out=data.held_out,
        mesh=mesh,
        frozen=frozen,
    )

    def state_from(params: Params) -> TrainState:
        return init_state(params, optimizer, key, shardings)

    make_params = make_trained_params if models.lora is None else make_adapter
    return Preparation(
        mesh=mesh,
        models=models,
        objective=find_objective(config),
        data=data,
        programs=programs,
        turns=base_turns(config),
        abstract_state=abstract_state(place.shapes, optimizer, key, shardings),
        make_state=lambda: state_from(make_params(config, models, place, key)),
        frozen=frozen,
        state_from=state_from,
    )


def base_turns(config: TrainConfig) -> BaseTurns:
    """The sequence of bases, one per batch."""
    return BaseTurns(tuple(base.weight for base in config.all_bases), config.seed)


def place_trained(config: TrainConfig, models: Models, mesh: Mesh) -> Placement:
    """Decide where the trained parameters live."""
    if models.lora is not None:
        return place_adapter(config, models, models.lora, mesh)
    return place_model(
        models.arch,
        layout=config.trained_layout,
        param_dtype=jnp.float32,
        scan_layers=config.step.scan_layers,
        mesh=mesh,
    )


def make_run_optimizer(
    config: TrainConfig, total_steps: int
) -> tuple[Schedules, optax.GradientTransformation]:
    """Make the run's schedules, and the optax chain that follows that of the learning rate."""
    options = config.optimizer
    schedule = make_schedule(
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_fraction=options.warmup_fraction,
        final_fraction=options.final_fraction,
        total_steps=total_steps,
    )
    penalty = make_penalty_schedule(config.penalty.schedule, total_steps=total_steps)
    return Schedules(schedule, penalty), make_optimizer(
        schedule,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        max_gradient_norm=options.max_gradient_norm,
        moment_dtype=options.moment_dtype,
    )


def _source(options: DataConfig) -> DemonstrationSource:
    return DemonstrationSource(
        train=options.train,
        validation=options.validation,
        row_format=options.rows.format,
        templates=options.rows.templates,
        validation_fraction=options.validation_fraction,
        group_field=options.group_field or "",
    )
