"""Compiles infer.py's programs for a machine that is not attached.

In: the flags of a composed model, a batch, and a machine. Out: `DecodingPlan`: bytes per device of
reading the prompts and of generating, and the speed that memory allows. Architectures are read,
but no weights and no tokenizers; vocabularies are taken to agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ivl_jax.composed.network import ComposedParams, Composition
from ivl_jax.composed.sources import load_schemes
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.config import ComposedModelConfig, ConfigError, TrainConfig
from ivl_jax.decoding.device.shardings import row_multiple, state_shardings
from ivl_jax.decoding.loading import decoding_mesh
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.requests import bucket_capacity
from ivl_jax.decoding.shapes import abstract_composition, lower_chunk, lower_prefill
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.network import Architecture
from ivl_jax.plan.compiled import Compiled, compile_program, lowering_for, warn_of_dtype
from ivl_jax.plan.decode_flags import DecodeConfig, check_decode_flags
from ivl_jax.plan.devices import describe_devices
from ivl_jax.plan.machines import Machine
from ivl_jax.plan.models import planned_models, read_architecture, read_value_architecture
from ivl_jax.sharding import LAYOUTS, make_mesh


@dataclass(frozen=True)
class DecodingPlan:
    """What decoding takes; bytes per device."""

    rows: int
    """Of the batch, padding rows included: a multiple of the parts that rows are split into."""
    base: int
    """Of its parameters."""
    values: int
    """Of the parameters of all value networks."""
    caches: int
    prefill: Compiled
    """Reading a batch of prompts as long as the context."""
    chunk: Compiled
    """Generating tokens for the batch."""
    available: int
    bytes_per_step: int
    """Read to generate one token per row: all parameters but embeddings, of which only the rows of
    these tokens are read, and all caches."""
    tokens_per_second: float
    """Of all rows but padding, where reading those bytes takes all of the time."""

    @property
    def fits(self) -> bool:
        """Whether both programs fit a device's memory."""
        return self.prefill.fits and self.chunk.fits

    @property
    def peak(self) -> int:
        """The larger peak of both programs."""
        return max(self.prefill.peak, self.chunk.peak)


def plan_decoding(
    config: DecodeConfig, machine: Machine, *, run: TrainConfig | None = None
) -> DecodingPlan:
    """Compile prefill and a chunk of decoding; nothing runs, and no weights are read.

    Args:
        config: the models and the batch.
        machine: where they would be decoded.
        run: whose value network is meant where the flags name none.

    Returns:
        The plan.

    Raises:
        ConfigError: flags are missing or not supported, the mesh does not fit the machine, or a row
            exceeds a network's context.
        MissingCompilerError: the machine's compiler is not installed.
    """
    check_decode_flags(config, run)
    base = read_architecture(config.model.base, None, "base")
    mesh = _mesh(config, base, describe_devices(machine))
    networks = _networks(config.model, base, run, mesh, memory=machine.memory)
    capacity = _capacity(config, networks)
    model = config.model
    composition, params = abstract_composition(
        networks.base,
        networks.values,
        mesh=mesh,
        dtype=model.dtype,
        scheme=networks.scheme,
        base_rules=LAYOUTS[model.base_layout],
        value_rules=LAYOUTS[model.value_layout],
        int8_base=model.int8_base,
    )
    multiple = row_multiple(composition)
    rows = -(-config.batch // multiple) * multiple
    held = tree_bytes(params)
    caches = cache_bytes(composition, rows=rows, capacity=capacity)
    warn_of_dtype(machine, model.dtype)
    with lowering_for(machine):
        chunk = compile_program(
            lower_chunk(composition, params, rows=rows, capacity=capacity),
            machine,
            held=held + caches,
            one_pass=True,  # a token
        )
        prefill = compile_program(
            lower_prefill(composition, params, rows=rows, prompt=capacity, capacity=capacity),
            machine,
            held=held,
        )
    step = bytes_read(composition, params) + caches
    return DecodingPlan(
        rows=rows,
        base=tree_bytes(params.base),
        values=tree_bytes(params.values),
        caches=caches,
        prefill=prefill,
        chunk=chunk,
        available=machine.memory,
        bytes_per_step=step,
        tokens_per_second=config.batch * machine.bandwidth / step,
    )


class _Networks(NamedTuple):
    base: ArchConfig
    values: Sequence[Architecture]
    scheme: ConnectionScheme


def _mesh(config: DecodeConfig, base: ArchConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that infer.py makes there; of one device where that needs none."""
    try:
        mesh = decoding_mesh(config.model.mesh, base, devices)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from error
    return make_mesh(devices=devices) if mesh is None else mesh


def _networks(
    model: ComposedModelConfig,
    base: ArchConfig,
    run: TrainConfig | None,
    mesh: Mesh,
    *,
    memory: int,
) -> _Networks:
    if model.value:
        schemes = load_schemes(model.connection)
        read = [
            read_value_architecture(path, where="value", schemes=schemes) for path in model.values
        ]
        kinds = {scheme for _, scheme in read} or {SCHEMES["residual"]}
        if len(kinds) > 1:
            raise ConfigError(
                "value networks of different connection schemes are not planned together"
            )
        return _Networks(base, [arch for arch, _ in read], kinds.pop())
    assert run is not None, "checked by check_decode_flags"
    trained = planned_models(run, mesh, memory=memory)
    assert trained.scheme is not None, "a run that trains a value network has a scheme"
    return _Networks(base, [trained.arch], trained.scheme)


def _capacity(config: DecodeConfig, networks: _Networks) -> int:
    """Slots per row."""
    archs = [networks.base, *networks.values]
    contexts = [arch.max_position_embeddings for arch in archs if isinstance(arch, ArchConfig)]
    if config.context > min(contexts):
        raise ConfigError(
            f"context = {config.context} exceeds the smallest context of the networks, "
            f"{min(contexts)} tokens: lower it"
        )
    return bucket_capacity(config.context, context=min(contexts))


def cache_bytes(composition: Composition, *, rows: int, capacity: int) -> int:
    """Bytes of all caches on each device.

    Args:
        composition: the static half.
        rows: of the batch.
        capacity: slots per row.

    Returns:
        Bytes.
    """
    programs = build_programs(composition)
    state = programs.empty.eval_shape(rows=rows, capacity=capacity, stop_ids=1)  # pyright: ignore
    shardings = state_shardings(composition, None)
    assert shardings is not None, "shapes are placed on a mesh"
    per_network = jax.tree.map(
        lambda sharding, cache: sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(cache)
        ),
        shardings.caches,
        state.caches,
    )
    return sum(jax.tree.leaves(per_network))


def bytes_read(composition: Composition, params: ComposedParams) -> int:
    """Bytes of parameters that generating one token per row reads on each device.

    Args:
        composition: the static half.
        params: shapes with shardings.

    Returns:
        Bytes; of embeddings only the rows of these tokens are read.
    """
    whole = [params.base, *(value.params for value in params.values)]
    # Schemes that read the base's predictions multiply them with the whole embedding.
    multiplies = [False, *(value.connection.reads_base_logits for value in composition.values)]
    return sum(
        tree_bytes(tree if multiplied else {k: v for k, v in tree.items() if k != "embed_tokens"})
        for tree, multiplied in zip(whole, multiplies, strict=True)
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device; a typed key counts as its data."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * getattr(leaf.dtype, "itemsize", 8)
        for leaf in jax.tree.leaves(tree)
    )
