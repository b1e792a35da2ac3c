"""From a config to everything a run needs: data, models, objective, compiled steps.

In: a config. Out: `Preparation`. What is cheap and can be wrong comes first; weights are read last.
"""

import functools
import logging
from collections.abc import Callable
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
from ivl_jax.data.tokenized import TokenizedDemonstrations, tokenize_demonstrations
from ivl_jax.model.decoder import Params, build_decoder
from ivl_jax.sharding import LAYOUTS, activation_constraint, batch_ways, data_shard, make_mesh
from ivl_jax.training.evaluation import HeldOut
from ivl_jax.training.models import (
    Models,
    Placement,
    load_base,
    make_trained_params,
    place_model,
)
from ivl_jax.training.objective import Objective, choose_chunk_length
from ivl_jax.training.optimizer import make_optimizer, make_schedule
from ivl_jax.training.step import (
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

logger = logging.getLogger(__name__)

# Logits of one model that exist at once on one device. On CPU a chunk that stays near the caches is
# as fast as the whole and takes a fraction of the memory (8 MB in f32); accelerators want matmuls
# large enough to fill them (512 MB).
_MAX_LOGITS = {"cpu": 1 << 21}
_MAX_LOGITS_ACCELERATOR = 1 << 27


@dataclass(frozen=True)
class Data:
    """Batches to train on and to evaluate on, and how their text was made."""

    train: TrainIterator
    held_out: EvalBatches | None
    chat_format: ChatFormat
    total_steps: int


@dataclass(frozen=True)
class Preparation:
    """Everything a run needs once its weights are read."""

    mesh: Mesh
    models: Models
    data: Data
    base_params: Params | None
    step: TrainStep
    held_out: HeldOut | None
    abstract_state: TrainState
    make_state: Callable[[], TrainState]
    """Reads or makes the trained parameters; not called when a checkpoint is restored."""


def make_run_mesh(config: TrainConfig) -> Mesh:
    """Make the mesh and check that the batch divides over it.

    Raises:
        ConfigError: the mesh does not fit the devices, or the batch does not divide.
    """
    try:
        sizes = config.mesh
        mesh = make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from error
    rows, ways = config.step.batch_size // config.step.micro_batches, batch_ways(mesh)
    if rows % ways:
        raise ConfigError(
            f"step.batch_size / step.micro_batches = {rows} rows do not divide over data × fsdp = "
            f"{ways} devices: make it a multiple of {ways}, or set mesh.tensor"
        )
    return mesh


def prepare_data(config: TrainConfig, models: Models, mesh: Mesh) -> Data:
    """Store, tokenise and batch the demonstrations.

    Args:
        config: of the run.
        models: whose tokenizer turns dialogues into tokens (the trained model's).
        mesh: decides which rows this process reads.

    Returns:
        The data of the run.

    Raises:
        ConfigError: no held-out split although evaluation is asked for.
        MalformedRowsError: too many rows are malformed.
    """
    options = config.data
    info = models.trained.info
    chat_format = make_chat_format(models.trained.tokenizer, template=options.chat_template)
    # Every process does this by itself: hosts may have disks of their own, and on a shared one what
    # they write is the same.
    stored = store_demonstrations(
        _source(options),
        data_dir=options.data_dir,
        max_malformed_share=options.max_malformed_fraction,
    )
    split: dict[str, TokenizedDemonstrations] = {
        name: tokenize_demonstrations(
            stored.open(name),
            chat_format,
            sequence_length=options.max_length,
            cache_dir=options.data_dir,
            max_malformed_share=options.max_malformed_fraction,
        )
        for name in ("train", "validation")
        if stored.counts.get(name)
    }
    index, count = data_shard(mesh)
    layout: dict[str, Any] = {
        "pad_id": info.pad_id,
        "packing": options.packing,
        "process_index": index,
        "process_count": count,
    }
    rows = config.step.batch_size
    train = make_train_iterator(split["train"], batch_size=rows, seed=config.seed, **layout)
    held_out = None
    if "validation" in split:
        held_out = make_eval_batches(
            split["validation"],
            batch_size=rows // config.step.micro_batches,
            max_rows=config.logging.evaluation_rows,
            **layout,
        )
    else:
        logger.warning("no held-out demonstrations: data.validation_fraction is 0; no evaluation")
    steps = config.step.max_steps or max(1, round(config.step.epochs * train.steps_per_epoch))
    return Data(train, held_out, chat_format, steps)


def prepare(config: TrainConfig, models: Models, data: Data, mesh: Mesh) -> Preparation:
    """Read the base's weights and build the programs of a run.

    Args:
        config: of the run.
        models: from `choose_models`.
        data: from `prepare_data`.
        mesh: the device mesh.

    Returns:
        Everything but the state.
    """
    place, base_place = _placements(config, models, mesh)
    objective = make_objective(config, models, place, mesh)
    schedule, optimizer = _optimizer(config, data.total_steps)
    shardings = state_shardings(place.shapes, place.shardings, optimizer, mesh)
    key = jax.random.key(config.seed)
    base_params = None
    if models.base is not None and base_place is not None:
        base_params = load_base(models.base, config.base, base_place)
    base_shardings = None if base_place is None else base_place.shardings
    evaluate = make_eval_step(
        objective, shardings=place.shardings, base_shardings=base_shardings, mesh=mesh
    )
    held_out = None
    if data.held_out is not None:
        held_out = HeldOut(
            evaluate,
            data.held_out,
            count=len(data.held_out),
            base_params=base_params,
            mesh=mesh,
        )

    def make_state() -> TrainState:
        params = make_trained_params(config, models, place, key)
        return init_state(params, optimizer, key, shardings)

    return Preparation(
        mesh=mesh,
        models=models,
        data=data,
        base_params=base_params,
        step=make_train_step(
            objective,
            optimizer,
            schedule,
            shardings=shardings,
            base_shardings=base_shardings,
            mesh=mesh,
        ),
        held_out=held_out,
        abstract_state=abstract_state(place.shapes, optimizer, key, shardings),
        make_state=make_state,
    )


def make_objective(config: TrainConfig, models: Models, place: Placement, mesh: Mesh) -> Objective:
    """Put the static half of the loss together.

    Args:
        config: of the run.
        models: from `choose_models`.
        place: of the trained model.
        mesh: the device mesh.

    Returns:
        The objective.
    """
    step = config.step
    decoder = functools.partial(
        build_decoder, compute_dtype=jnp.dtype(step.compute_dtype), scan_layers=step.scan_layers
    )
    size = models.trained.info.vocab_size
    alone = models.base is None
    layout = config.base.layout if alone else config.value.layout
    chunk_length = choose_chunk_length(
        step.batch_size // step.micro_batches // batch_ways(mesh),
        config.data.max_length,
        place.vocab_rows,
        max_logits=_MAX_LOGITS.get(jax.default_backend(), _MAX_LOGITS_ACCELERATOR),
    )
    return Objective(
        graphdef=decoder(models.arch, remat=step.remat),
        base_graphdef=None if models.base is None else decoder(models.base.arch),
        vocab_size=size if models.base is None else models.base.info.vocab_size,
        value_vocab_size=size,
        unknown_ids=models.unknown_ids,
        connection=config.value.connection,
        penalty_kind="none" if alone else config.penalty.kind,
        penalty_weight=0.0 if alone or config.penalty.kind == "none" else config.penalty.weight,
        penalty_positions=config.penalty.positions,
        chunk_length=chunk_length,
        constrain=activation_constraint(mesh, LAYOUTS[layout]),
        base_constrain=activation_constraint(mesh, LAYOUTS[config.base.layout]),
    )


def _placements(
    config: TrainConfig, models: Models, mesh: Mesh
) -> tuple[Placement, Placement | None]:
    place = functools.partial(place_model, scan_layers=config.step.scan_layers, mesh=mesh)
    layout = config.base.layout if models.base is None else config.value.layout
    trained = place(models.arch, layout=layout, param_dtype=jnp.float32)
    if models.base is None:
        return trained, None
    dtype = jnp.dtype(config.base.param_dtype)
    return trained, place(models.base.arch, layout=config.base.layout, param_dtype=dtype)


def _optimizer(
    config: TrainConfig, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    options = config.optimizer
    schedule = make_schedule(
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_fraction=options.warmup_fraction,
        final_fraction=options.final_fraction,
        total_steps=total_steps,
    )
    return schedule, make_optimizer(
        schedule,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        max_gradient_norm=options.max_gradient_norm,
    )


def _source(options: DataConfig) -> DemonstrationSource:
    templates = {}
    if options.format == "fields":
        templates = {"user": options.user_template, "assistant": options.assistant_template}
    return DemonstrationSource(
        train=options.train,
        validation=options.validation,
        row_format=options.format,
        templates=templates,
        validation_fraction=options.validation_fraction,
        group_field=options.group_field or "",
    )
