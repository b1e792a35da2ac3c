"""Compiles the optimizer step of a run for a machine that is not attached.

In: a config and a machine. Out: `TrainingPlan`: bytes per device, FLOPs, and whether it fits. The
program is the one that train.py compiles, made by the same functions from the same shapes.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.data.batching import Batch
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import Architecture
from ivl_jax.plan.compiled import compile_program, lowering_for
from ivl_jax.plan.devices import describe_devices
from ivl_jax.plan.machines import Machine
from ivl_jax.plan.models import planned_models
from ivl_jax.sharding import batch_sharding
from ivl_jax.training.models import FrozenBase, Models
from ivl_jax.training.programs import place_in_step, step_programs
from ivl_jax.training.setup import make_run_mesh, make_run_optimizer, place_trained, state_shapes
from ivl_jax.training.step import state_shardings


@dataclass(frozen=True)
class TrainingPlan:
    """What a step takes on each device, in bytes."""

    base: int
    value: int
    """Of the trained network, in float32."""
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
    seconds: float
    """The step's time if it ran at the machine's peak rate in the compute dtype."""


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
    if config.objective in ("grpo", "distil"):
        raise ConfigError(
            f'objective = "{config.objective}": a teacher and sampled answers are not planned yet; '
            'plan the step with objective = "sft" or "dpo"'
        )
    mesh = make_run_mesh(config, describe_devices(machine))
    models = planned_models(config, mesh)
    with lowering_for(machine):
        return [_plan(config, machine, models, base, mesh) for base in models.bases or (None,)]


def _plan(
    config: TrainConfig, machine: Machine, models: Models, base: FrozenBase | None, mesh: Mesh
) -> TrainingPlan:
    place = place_trained(config, models, mesh)
    base_place = None if base is None else place_in_step(config, base, mesh)
    schedule, optimizer = make_run_optimizer(config, total_steps=1000)
    shardings = state_shardings(place.shapes, place.shardings, optimizer, mesh)
    state = state_shapes(config, models, mesh)
    frozen = None
    if base_place is not None:
        frozen = _with_shardings(base_place.shapes, base_place.shardings)
    batch = _batch_shapes(config, base, mesh)
    programs = step_programs(
        config,
        models,
        base,
        place,
        base_place,
        optimizer=optimizer,
        schedule=schedule,
        shardings=shardings,
        mesh=mesh,
    )
    step: Any = programs.step
    arguments = (state, frozen, batch)
    fits, temporaries, peak = compile_program(
        step.lower(*arguments), machine, held=_bytes(arguments)
    )
    flops = step_flops(config, models, base)
    return TrainingPlan(
        base=_bytes(frozen),
        value=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(batch),
        temporaries=temporaries,
        peak=peak,
        available=machine.memory,
        fits=fits,
        tokens=config.step.batch_size * config.data.max_length,
        flops=flops,
        seconds=flops / (machine.devices * machine.flops(config.step.compute_dtype)),
    )


def step_flops(config: TrainConfig, models: Models, base: FrozenBase | None) -> float:
    """The multiplications and additions of one step, over all devices.

    Per token: 2 for each parameter of a matrix in the forward pass and 4 in the backward pass,
    2 more where layers are recomputed; attention reads T / 2 keys on average.

    Args:
        config: of the run.
        models: of the run.
        base: runs forward only, and not at all where its states are cached; None: no base.

    Returns:
        FLOPs.
    """
    length = config.data.max_length
    tokens = config.step.batch_size * length
    layers, head = _forward_flops(models.arch, length)
    total = (4 if config.step.remat else 3) * layers + 3 * head
    if base is not None:
        layers, head = _forward_flops(base.model.arch, length)
        total += head + (0 if base.config.cache_states else layers)
    return float(total) * tokens


def _forward_flops(arch: Architecture, length: int) -> tuple[float, float]:
    """Per token of the forward pass: (layers, head)."""
    if isinstance(arch, LinearMapConfig):
        parameters = 2 * arch.vocab_size * arch.rank if arch.rank else arch.vocab_size**2
        return 0.0, 2.0 * parameters
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads
    projections = 2 * arch.hidden_size * arch.head_dim * (heads + kv_heads)
    mlp = 3 * arch.hidden_size * arch.intermediate_size
    attention = 2 * heads * arch.head_dim * length / 2
    layer = 2.0 * (projections + mlp + attention)
    return arch.num_hidden_layers * layer, 2.0 * arch.hidden_size * arch.vocab_size


def _batch_shapes(config: TrainConfig, base: FrozenBase | None, mesh: Mesh) -> Batch:
    micro = config.step.micro_batches
    shape = (micro, config.step.batch_size // micro, config.data.max_length)
    sharding = batch_sharding(mesh, micro_batched=True)

    def array(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=sharding)

    ids, states = array(jnp.int32), None
    if base is not None and base.config.cache_states:
        states = array(jnp.dtype(config.step.compute_dtype), base.model.decoder.hidden_size)
    return Batch(ids, ids, array(jnp.bool_), ids, ids, states)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device; a typed key counts as its data."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * getattr(leaf.dtype, "itemsize", 8)
        for leaf in jax.tree.leaves(tree)
    )
