"""Compiles the optimizer step of a run for a machine that is not attached.

In: a config and a machine. Out: `TrainingPlan`: bytes per device, FLOPs, and whether it fits. The
program is the one that train.py compiles, made by the same functions from the same shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.config import TrainConfig
from ivl_jax.data.batching import Batch
from ivl_jax.model.assembly import static_attribute
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.remat import Remat
from ivl_jax.plan.compiled import compile_program, lowering_for, warn_of_dtype
from ivl_jax.plan.decoding import tree_bytes
from ivl_jax.plan.devices import describe_devices
from ivl_jax.plan.machines import Machine
from ivl_jax.plan.models import planned_models
from ivl_jax.plan.rollouts import RolloutsPlan, plan_rollouts
from ivl_jax.plan.work import step_flops, step_traffic
from ivl_jax.sharding import batch_sharding, batch_ways
from ivl_jax.training.adapter import place_frozen
from ivl_jax.training.loss import Loss
from ivl_jax.training.models import FrozenBase, Models
from ivl_jax.training.objectives import find_objective
from ivl_jax.training.programs import place_in_step, step_programs
from ivl_jax.training.reference import describe_reference
from ivl_jax.training.setup import make_run_mesh, make_run_optimizer, place_trained, state_shapes
from ivl_jax.training.step import state_shardings


@dataclass(frozen=True)
class TrainingPlan:
    """What a step takes on each device, in bytes."""

    base: int
    value: int
    """Of the trained parameters, in float32."""
    optimizer: int
    batch: int
    temporaries: int | None
    """Activations, gradients and everything else; None if the compiler's refusal omits them."""
    peak: int
    available: int
    fits: bool
    """Whether the compiler could place the program in a device's memory."""
    tokens: int
    """Positions of a global batch."""
    flops: float
    """Of a step over all devices; see `step_flops`."""
    traffic: float
    """Bytes per device to and from memory; see `step_traffic`."""
    sent: Mapping[str, int] | None
    """Kind of collective → bytes that each device sends; None if the compiler refused."""
    ways: int
    """Devices over which the rows of a micro-batch are split."""
    remat: Remat
    """What the trained network's layers keep: the config's choice, or the one made for `auto`."""
    limits: Mapping[str, float]
    """Seconds that a step takes at least, by what limits it: compute (FLOPs at the peak rate),
    memory (traffic at its bandwidth) and, unless the compiler refused, interconnect (bytes sent at
    the rate of all links). The three overlap at best; real steps take longer."""
    teacher: int = 0
    """Of the frozen model that the objective compares with, beside the base."""
    rollouts: RolloutsPlan | None = None
    """Of sampling answers; None if the objective learns from those of the rows."""
    frozen: int = 0
    """Of the trained network's weights that stay frozen under an adapter."""

    @property
    def seconds(self) -> float:
        """The least time of a step, in seconds."""
        return max(self.limits.values())


def plan_training(config: TrainConfig, machine: Machine) -> list[TrainingPlan]:
    """Compile the step with each base of a run; nothing runs, and no weights are read.

    Args:
        config: of the run.
        machine: where it would run.

    Returns:
        A plan per base, in the config's order; a single one without a base.

    Raises:
        ConfigError: the config does not fit the machine's mesh, or a `config.json` is missing.
        MissingCompilerError: the machine's compiler is not installed.
    """
    mesh = make_run_mesh(config, describe_devices(machine))
    models = planned_models(config, mesh, memory=machine.memory)
    warn_of_dtype(machine, config.step.compute_dtype)
    with lowering_for(machine):
        return [_plan(config, machine, models, base, mesh) for base in models.bases or (None,)]


def _plan(
    config: TrainConfig, machine: Machine, models: Models, base: FrozenBase | None, mesh: Mesh
) -> TrainingPlan:
    place, frozen_place = place_trained(config, models, mesh), place_frozen(config, models, mesh)
    base_place = None if base is None else place_in_step(config, base, mesh)
    schedules, optimizer = make_run_optimizer(config, total_steps=1000)
    shardings = state_shardings(place.shapes, place.shardings, optimizer, mesh)
    state = state_shapes(config, models, mesh)
    frozen = None
    if base_place is not None:
        frozen = _with_shardings(base_place.shapes, base_place.shardings)
    batch = _batch_shapes(config, base, mesh)
    teacher = describe_reference(config, models, mesh)
    programs = step_programs(
        config,
        models,
        base,
        place,
        base_place,
        optimizer=optimizer,
        schedules=schedules,
        shardings=shardings,
        mesh=mesh,
        memory=machine.memory,
        teacher=teacher,
    )
    step: Any = programs.step
    arguments: tuple[Any, ...] = (state, frozen, batch)
    taught_params, weights = None if teacher is None else teacher.params, None
    if frozen_place is not None:
        weights = _with_shardings(frozen_place.shapes, frozen_place.shardings)
        arguments += (taught_params, weights)
    elif teacher is not None:
        arguments += (taught_params,)
    compiled = compile_program(step.lower(*arguments), machine, held=tree_bytes(arguments))
    fits, peak = compiled.fits, compiled.peak
    held = {"trained": tree_bytes(state.params), "optimizer": tree_bytes(state.opt_state)}
    taught = 0 if teacher is None else tree_bytes(teacher.params)
    rollouts, sampling = None, find_objective(config).sampling
    if sampling is not None:
        rollouts = plan_rollouts(config, machine, models, base, mesh, sampling)
        # Moments, teacher and the weights under an adapter wait while answers are sampled; so do
        # layers that are stacked, of which the engine has a copy.
        stacked = held["trained"] if config.step.scan_layers else 0
        beside = held["optimizer"] + taught + stacked + tree_bytes(weights)
        peak = max(peak, rollouts.peak + beside)
        fits = fits and rollouts.fits and peak <= machine.memory
    remat = _remat(programs.loss)
    config = replace(config, step=replace(config.step, remat=remat))
    flops = step_flops(config, models, base)
    traffic = step_traffic(config, models, base, mesh, **held)
    return TrainingPlan(
        base=tree_bytes(frozen),
        value=held["trained"],
        frozen=tree_bytes(weights),
        optimizer=held["optimizer"],
        batch=tree_bytes(batch),
        temporaries=compiled.temporaries,
        peak=peak,
        available=machine.memory,
        fits=fits,
        tokens=config.step.batch_size * config.data.max_length,
        flops=flops,
        traffic=traffic,
        sent=compiled.sent,
        ways=batch_ways(mesh),
        limits=_limits(config, machine, flops / mesh.size, traffic, compiled.sent),
        teacher=taught,
        rollouts=rollouts,
        remat=remat,
    )


def _remat(loss: Loss) -> Remat:
    """The policy of the trained network: the config's, or the one chosen for `auto`."""
    trained = loss.trained
    if isinstance(trained.arch, LinearMapConfig):
        return "none"
    return static_attribute(trained.graphdef, "remat")


def _limits(
    config: TrainConfig,
    machine: Machine,
    flops: float,
    traffic: float,
    sent: Mapping[str, int] | None,
) -> dict[str, float]:
    """What limits a step → seconds, from FLOPs and bytes per device."""
    limits = {
        "compute": flops / machine.flops(config.step.compute_dtype),
        "memory": traffic / machine.bandwidth,
    }
    if sent is not None and machine.interconnect:
        limits["interconnect"] = sum(sent.values()) / machine.interconnect
    return limits


def _batch_shapes(config: TrainConfig, base: FrozenBase | None, mesh: Mesh) -> Batch:
    micro = config.step.micro_batches
    shape = (micro, config.step.batch_size // micro, config.data.max_length)
    sharding = batch_sharding(mesh, micro_batched=True)

    def array(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=sharding)

    ids, states = array(jnp.int32), None
    if base is not None and base.config.cache_states:
        states = array(jnp.dtype(config.step.compute_dtype), base.model.decoder.hidden_size)
    batch = Batch(ids, ids, array(jnp.bool_), ids, ids, states)
    sampling = find_objective(config).sampling
    if sampling is None:
        return batch
    column = array(jnp.float32)
    return batch._replace(
        advantages=column if sampling.rewarded else None,
        sampled_log_probs=column if sampling.updates > 1 else None,
    )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
