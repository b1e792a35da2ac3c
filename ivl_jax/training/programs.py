"""The compiled programs of a run: a training step and a held-out evaluation for every base.

In: a config, models and their places on the mesh. Out: `BaseProgram`s. Bases of the same
architecture share their programs; all of them share the train state.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ivl_jax.composed.network import ComposedParams, Composition, Layout
from ivl_jax.composed.token_scores import choose_chunk_length
from ivl_jax.config import TrainConfig
from ivl_jax.data.batching import EvalBatches
from ivl_jax.devices import device_memory
from ivl_jax.model.decoder import Params
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.remat import Remat
from ivl_jax.sharding import LAYOUTS, batch_ways
from ivl_jax.training.activations import choose_remat, shard_bytes
from ivl_jax.training.adapter import place_frozen
from ivl_jax.training.evaluation import HeldOut
from ivl_jax.training.loss import Loss
from ivl_jax.training.models import (
    FrozenBase,
    Models,
    Placement,
    attention_of,
    head_only,
    load_base,
    place_base,
)
from ivl_jax.training.networks import distils_depths, frozen_network, trained_network
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.optimizer import Schedules
from ivl_jax.training.reference import load_reference
from ivl_jax.training.step import (
    EvalStep,
    FirstPass,
    TrainState,
    TrainStep,
    make_eval_step,
    make_first_pass,
    make_train_step,
)
from ivl_jax.training.teacher import Teacher

# Logits of one model that exist at once on one device. On CPU a chunk that fits the caches is as
# fast as the whole and takes a fraction of the memory (8 MB in f32); accelerators need matmuls
# large enough to fill them: 128 MB are 1,024 tokens of a vocabulary of 32,000. With four times as
# many a step of 1.1B + 7B, 8 rows of 4,096 on v5e-8, takes 5.88 GB per device instead of 5.15.
_MAX_LOGITS = {"cpu": 1 << 21}
_MAX_LOGITS_ACCELERATOR = 1 << 25
# With a vocabulary of 128,256 and heads of 288 on CPU, chunks of 16 tokens take 1.46 × as long as
# chunks of 128.
_MIN_TOKENS = 128


@dataclass(frozen=True)
class BaseProgram:
    """Training and evaluation with one base, or of a model without one."""

    name: str
    """The base's path in the config."""
    base: FrozenBase | None
    """The base; None if a model is trained without one."""
    base_params: Params | None
    """Its frozen parameters (only the head if its states are cached); None without a base."""
    step: TrainStep
    held_out: HeldOut | None
    """None without held-out demonstrations."""
    first_pass: FirstPass
    """What the weights of a batch that several steps train on depend on."""


class StepPrograms(NamedTuple):
    """The programs that bases of one kind share."""

    loss: Loss
    step: TrainStep
    evaluate: EvalStep
    first_pass: FirstPass


def build_programs(
    config: TrainConfig,
    models: Models,
    place: Placement,
    *,
    optimizer: optax.GradientTransformation,
    schedules: Schedules,
    shardings: TrainState,
    held_out: Sequence[EvalBatches],
    mesh: Mesh,
    frozen: Params | None = None,
) -> tuple[BaseProgram, ...]:
    """Read the bases' weights and build each one's programs.

    Args:
        config: of the run.
        models: from `choose_models`.
        place: of the trained model.
        optimizer: the optax chain.
        schedules: of the learning rate that it follows, and of λ.
        shardings: of the train state.
        held_out: batches to evaluate on, for each base; empty: no evaluation.
        mesh: the device mesh.
        frozen: the trained network's frozen parameters, if an adapter is trained.

    Returns:
        One per base in the config's order; a single one without a base.
    """
    compiled: dict[Hashable, StepPrograms] = {}
    teacher = load_reference(config, models, mesh)
    programs = []
    bases: Sequence[FrozenBase | None] = models.bases or (None,)
    for index, base in enumerate(bases):
        base_place = None if base is None else place_in_step(config, base, mesh)
        kind = None if base is None else _kind(base)
        if kind not in compiled:
            programs_of_kind = step_programs(
                config,
                models,
                base,
                place,
                base_place,
                optimizer=optimizer,
                schedules=schedules,
                shardings=shardings,
                mesh=mesh,
                teacher=teacher,
            )
            compiled[kind] = _with_frozen(programs_of_kind, teacher and teacher.params, frozen)
        loss, step, evaluate, first_pass = compiled[kind]
        base_params = None
        if base is not None and base_place is not None:
            base_params = load_base(base.model, base.config, base_place)
        evaluation = None
        if held_out:
            batches = held_out[index]
            evaluation = HeldOut(
                evaluate,
                batches,
                count=len(batches),
                base_params=base_params,
                figures=loss.figures,
                mesh=mesh,
            )
        name = models.trained.path if base is None else base.model.path
        programs.append(BaseProgram(name, base, base_params, step, evaluation, first_pass))
    return tuple(programs)


def _with_frozen(
    programs: StepPrograms, teacher: ComposedParams | None, frozen: Params | None
) -> StepPrograms:
    """The programs with their optional arguments given; they are the same at every step."""
    step, evaluate, first_pass = programs.step, programs.evaluate, programs.first_pass
    if frozen is not None:
        more: tuple[Any, ...] = (teacher, frozen)
    elif teacher is not None:
        more = (teacher,)
    else:
        return programs
    return programs._replace(
        step=lambda state, base, batch: step(state, base, batch, *more),
        evaluate=lambda trained, base, batch: evaluate(trained, base, batch, *more),
        first_pass=lambda trained, base, batch: first_pass(trained, base, batch, *more),
    )


def step_programs(
    config: TrainConfig,
    models: Models,
    base: FrozenBase | None,
    place: Placement,
    base_place: Placement | None,
    *,
    optimizer: optax.GradientTransformation,
    schedules: Schedules,
    shardings: TrainState,
    mesh: Mesh,
    teacher: Teacher | None = None,
    memory: int | None = None,
) -> StepPrograms:
    """Make the training step and the evaluation step with one base; neither is compiled yet.

    Args:
        config: of the run.
        models: from `choose_models`.
        base: the base; None: without a base.
        place: of the trained model.
        base_place: from `place_in_step`; None without a base.
        optimizer: the optax chain.
        schedules: of the learning rate that it follows, and of λ.
        shardings: of the train state.
        mesh: the device mesh; its devices need not be attached.
        teacher: that the objective compares with; its parameters are the programs' fourth argument.
            None: there is none. Where an adapter is trained, the fifth are the trained network's
            frozen parameters.
        memory: bytes that a device has; None: ask the devices, which must then be attached.

    Returns:
        The loss and both steps.
    """
    teacher_shardings = None if teacher is None else teacher.shardings
    loss = make_loss(config, models, base, place, base_place, mesh, memory=memory, teacher=teacher)
    base_shardings = None if base_place is None else base_place.shardings
    frozen_place = place_frozen(config, models, mesh)
    frozen_shardings = None if frozen_place is None else frozen_place.shardings
    step = make_train_step(
        loss,
        optimizer,
        schedules,
        shardings=shardings,
        base_shardings=base_shardings,
        mesh=mesh,
        teacher_shardings=teacher_shardings,
        frozen_shardings=frozen_shardings,
    )
    evaluate = make_eval_step(
        loss,
        shardings=place.shardings,
        base_shardings=base_shardings,
        mesh=mesh,
        teacher_shardings=teacher_shardings,
        frozen_shardings=frozen_shardings,
    )
    first_pass = make_first_pass(
        loss,
        shardings=place.shardings,
        base_shardings=base_shardings,
        mesh=mesh,
        teacher_shardings=teacher_shardings,
        frozen_shardings=frozen_shardings,
    )
    return StepPrograms(loss, step, evaluate, first_pass)


def place_in_step(config: TrainConfig, base: FrozenBase, mesh: Mesh) -> Placement:
    """Decide where a step's arrays of a base live: only the head's if its states are cached."""
    place = place_base(config, base, mesh)
    return head_only(base.model.decoder, place) if base.config.cache_states else place


def make_loss(
    config: TrainConfig,
    models: Models,
    base: FrozenBase | None,
    place: Placement,
    base_place: Placement | None,
    mesh: Mesh,
    *,
    memory: int | None,
    teacher: Teacher | None = None,
) -> Loss:
    """Make the static half of the loss.

    Args:
        config: of the run.
        models: from `choose_models`.
        base: the base that the step trains with; None: without a base.
        place: of the trained model.
        base_place: of the base; None without one.
        mesh: the device mesh.
        memory: bytes that a device has; None: ask the devices, if that matters.
        teacher: that the objective compares with, or None.

    Returns:
        The loss.
    """
    rows = config.step.batch_size // config.step.micro_batches // batch_ways(mesh)
    heads = [at.vocab_rows for at in (place, base_place) if at is not None]
    if distils_depths(config):  # the logits of all depths exist together
        heads.append(place.vocab_rows * config.value.depths)
    if teacher is not None:
        heads.append(teacher.composition.base.arch.vocab_size)
    chunk_length = default_chunk_length(
        rows, config.data.max_length, max(heads), platform=mesh.devices.flat[0].platform
    )
    frozen = 0 if base_place is None else shard_bytes(base_place.shapes, base_place.shardings)
    if teacher is not None:
        frozen += shard_bytes(teacher.params, teacher.shardings)
    if (under := place_frozen(config, models, mesh)) is not None:
        frozen += shard_bytes(under.shapes, under.shardings)
    remat = _remat(config, models, place, mesh, rows=rows, frozen=frozen, memory=memory)
    trained = trained_network(config, models, mesh, remat=remat)
    objective = find_objective(config)
    common: dict[str, Any] = {"objective": objective, "chunk_length": chunk_length}
    if teacher is not None:
        common |= {"teacher": teacher.composition, "teacher_strengths": teacher.strengths}
    if base is None:
        return Loss(Composition(trained), **common)
    penalty = config.penalty
    return Loss(
        Composition(frozen_network(config, base, mesh), (trained,)),
        unknown_ids=base.unknown_ids,
        penalty_kind=penalty.kind,
        penalty_weight=0.0 if penalty.kind == "none" else penalty.weight,
        penalty_positions=penalty.positions,
        augmentation=config.augmentation if config.augmentation.shown else None,
        depths_distillation=config.value.depths_distillation if distils_depths(config) else 0.0,
        **common,
    )


def _remat(
    config: TrainConfig,
    models: Models,
    place: Placement,
    mesh: Mesh,
    *,
    rows: int,
    frozen: int,
    memory: int | None,
) -> Remat:
    """The config's policy, or the one that a device's memory asks for."""
    step, arch = config.step, models.arch
    if step.remat != "auto":
        return step.remat
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # XLA's CPU compiler merges unrolled layers with their recomputation, so it would save nothing.
    if isinstance(arch, LinearMapConfig) or (on_cpu and not step.scan_layers):
        return "none"
    trained = shard_bytes(place.shapes, place.shardings)
    moments = trained if config.optimizer.moment_dtype == "bfloat16" else 2 * trained
    layout = LAYOUTS[config.trained_layout]
    return choose_remat(
        arch,
        rows=rows,
        length=config.data.max_length,
        compute_dtype=jnp.dtype(step.compute_dtype),
        attention=attention_of(config, arch, Layout(mesh, layout)),
        held=2 * trained + moments + frozen,
        memory=_agreed_memory(mesh) if memory is None else memory,
    )


def _agreed_memory(mesh: Mesh) -> int | None:
    """Bytes per device; the least of all processes, which must make the same choice."""
    memory = device_memory(mesh) or 0
    if jax.process_count() > 1:
        memory = int(multihost_utils.process_allgather(np.float32(memory)).min())
    return memory or None


def default_chunk_length(rows: int, length: int, vocab_rows: int, *, platform: str) -> int:
    """Choose how many positions' logits exist at once.

    Args:
        rows: rows of a micro-batch on one device.
        length: positions per row.
        vocab_rows: output rows of the widest head.
        platform: of the mesh's devices: cpu, gpu or tpu.

    Returns:
        Positions per chunk.
    """
    max_logits = _MAX_LOGITS.get(platform, _MAX_LOGITS_ACCELERATOR)
    return choose_chunk_length(
        rows, length, vocab_rows, max_logits=max_logits, min_tokens=_MIN_TOKENS
    )


def _kind(base: FrozenBase) -> Hashable:
    """What determines a base's programs besides the run's config."""
    model = base.model
    settings = base.config.param_dtype, base.config.layout, base.config.cache_states
    return model.arch, settings, model.info.vocab_size, base.unknown_ids
