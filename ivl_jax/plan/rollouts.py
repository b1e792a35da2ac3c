"""Compiles the programs that sample answers for the steps of a run, for a machine not attached.

In: a config whose objective samples, its models and a machine. Out: `RolloutsPlan`: what the engine
takes while the train state waits. The programs are those of decoding, with the run's own sizes.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.composition import SCHEMES
from ivl_jax.config import TrainConfig
from ivl_jax.decoding.device.shardings import row_multiple
from ivl_jax.decoding.requests import bucket_capacity
from ivl_jax.decoding.shapes import abstract_composition, lower_chunk, lower_prefill
from ivl_jax.plan.compiled import compile_program
from ivl_jax.plan.decoding import bytes_read, cache_bytes, tree_bytes
from ivl_jax.plan.machines import Machine
from ivl_jax.sharding import LAYOUTS
from ivl_jax.training.models import FrozenBase, Models, float_dtype, kernel_form
from ivl_jax.training.objectives.objective import Sampling


@dataclass(frozen=True)
class RolloutsPlan:
    """What sampling takes on each device, in bytes, beside arrays of the step that it leaves."""

    caches: int
    peak: int
    """The larger of reading the prompts and generating, networks included."""
    fits: bool
    """Whether the compiler could place both programs in a device's memory."""
    held: int
    """Of the networks; the frozen base's are those of the step."""
    seconds: float
    """The least time to sample the answers of a batch: reading the networks and the caches once
    for every token of the longest answer."""


def plan_rollouts(
    config: TrainConfig,
    machine: Machine,
    models: Models,
    base: FrozenBase | None,
    mesh: Mesh,
    sampling: Sampling,
) -> RolloutsPlan:
    """Compile prefill and a chunk of decoding with a run's networks.

    Args:
        config: of the run.
        machine: where it would run; called within `lowering_for`.
        models: of the run.
        base: that samples with the value network; None: a model is trained alone.
        mesh: of the run.
        sampling: of its objective.

    Returns:
        The plan.
    """
    rules, dtype = LAYOUTS[config.trained_layout], jnp.dtype(config.step.compute_dtype)
    if base is None:
        composition, params = abstract_composition(
            models.arch, mesh=mesh, dtype=jnp.float32, base_rules=rules, compute_dtype=dtype
        )
    else:
        composition, params = abstract_composition(
            base.model.arch,
            [models.arch],
            mesh=mesh,
            dtype=float_dtype(base.config),
            value_dtype=jnp.float32,
            scheme=models.scheme or SCHEMES["residual"],
            base_rules=LAYOUTS[base.config.layout],
            value_rules=rules,
            int8_base=kernel_form(base.config).int8,
            int8_tied_head=False,
            compute_dtype=dtype,
        )
    multiple = row_multiple(composition)
    rows = -(-config.step.batch_size // multiple) * multiple
    context = min(
        network.arch.max_position_embeddings for network in (composition.base, *composition.values)
    )
    capacity = bucket_capacity(min(config.data.max_length + 1, context), context=context)
    prompt = max(config.data.max_length + 1 - sampling.max_new_tokens, 1)
    held, caches = tree_bytes(params), cache_bytes(composition, rows=rows, capacity=capacity)
    chunk = compile_program(
        lower_chunk(composition, params, rows=rows, capacity=capacity),
        machine,
        held=held + caches,
        one_pass=True,  # a token
    )
    prefill = compile_program(
        lower_prefill(
            composition,
            params,
            rows=rows,
            prompt=bucket_capacity(prompt, context=capacity),
            capacity=capacity,
        ),
        machine,
        held=held,
    )
    step = bytes_read(composition, params) + caches
    return RolloutsPlan(
        caches=caches,
        peak=max(chunk.peak, prefill.peak),
        fits=chunk.fits and prefill.fits,
        held=held,
        seconds=sampling.max_new_tokens * step / machine.bandwidth,
    )
