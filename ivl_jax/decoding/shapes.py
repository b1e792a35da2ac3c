"""Decoding's programs and their arguments as shapes: what to compile for a machine not attached.

In: architectures and a mesh. Out: a `Composition` with its parameters' shapes, then the shapes of a
batch's arrays, all with shardings. Nothing is allocated; `build_programs` makes the programs.

    composition, params = abstract_composition(base, [value], mesh=mesh, dtype=jnp.bfloat16)
    lowered = lower_prefill(composition, params, rows=64, prompt=3072, capacity=4096)
    lowered = lower_chunk(composition, params, rows=64, capacity=4096)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered
from jax.typing import DTypeLike

from ivl_jax.composed.kernel_form import network_shapes
from ivl_jax.composed.network import ComposedParams, Composition, Layout, Network, ValueArrays
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.decoding.device.proposals import Proposer
from ivl_jax.decoding.device.sampling import Sampling, row_keys
from ivl_jax.decoding.device.state import DecodeState, Requests
from ivl_jax.decoding.programs import build_programs
from ivl_jax.model.decoder import Params
from ivl_jax.model.network import Architecture
from ivl_jax.sharding import DEFAULT_RULES, ShardingRules, replicated

_STOP_IDS = 1


def abstract_composition(
    base: Architecture,
    values: Sequence[Architecture] = (),
    *,
    mesh: Mesh,
    dtype: DTypeLike,
    value_dtype: DTypeLike | None = None,
    scheme: ConnectionScheme = SCHEMES["residual"],
    base_rules: ShardingRules = DEFAULT_RULES,
    value_rules: ShardingRules = DEFAULT_RULES,
    int8_base: bool = False,
    int8_tied_head: bool = True,
    compute_dtype: DTypeLike | None = None,
) -> tuple[Composition, ComposedParams]:
    """Compose networks of one vocabulary that have no weights.

    Args:
        base: The base's architecture.
        values: Those of the value networks.
        mesh: Where they decode; its devices need not be attached.
        dtype: Of all parameters and, unless `compute_dtype` is given, of caches.
        value_dtype: Of those of the value networks, if they have another one.
        scheme: How the value networks are connected.
        base_rules: The base's sharding.
        value_rules: That of the value networks.
        int8_base: The base's kernels are in int8.
        int8_tied_head: So is its head where that is tied to the embedding.
        compute_dtype: Of activations and caches; None: that of the parameters.

    Returns:
        The static half, and the parameters' shapes with their shardings.
    """

    def network(
        arch: Architecture, rules: ShardingRules, dtype: DTypeLike, *, int8: bool = False
    ) -> tuple[Network, Params]:
        layout = Layout(mesh, rules)
        graphdef, params = network_shapes(
            arch,
            layout,
            dtype=dtype,
            int8=int8,
            int8_tied_head=int8_tied_head,
            compute_dtype=compute_dtype,
        )
        cache_dtype = str(jnp.dtype(compute_dtype or dtype))
        return Network(graphdef, arch, arch.vocab_size, cache_dtype, layout=layout), params

    base_network, base_params = network(base, base_rules, dtype, int8=int8_base)
    pairs = [network(arch, value_rules, value_dtype or dtype) for arch in values]
    networks = tuple(_connected(each, scheme) for each, _ in pairs)
    arrays = tuple(ValueArrays(params) for _, params in pairs)
    return Composition(base_network, networks), ComposedParams(base_params, arrays)


def lower_prefill(
    composition: Composition,
    params: ComposedParams,
    *,
    rows: int,
    prompt: int,
    capacity: int,
    proposer: Proposer | None = None,
) -> Lowered:
    """Lower the program that reads a batch of prompts.

    Args:
        composition: On a mesh, of one vocabulary.
        params: The arrays' shapes.
        rows: Prompts read together.
        prompt: Tokens per prompt, with padding.
        capacity: Slots per row.
        proposer: Where proposals come from.

    Returns:
        The lowered program; `compile` it.
    """
    program: Any = build_programs(composition, proposer).prefill
    tokens = jax.ShapeDtypeStruct((rows, prompt), jnp.int32, sharding=_whole(composition))
    requests = _request_shapes(composition, rows)
    return program.lower(params, tokens, requests, capacity=capacity)


def lower_chunk(
    composition: Composition,
    params: ComposedParams,
    *,
    rows: int,
    capacity: int,
    proposer: Proposer | None = None,
) -> Lowered:
    """Lower the program that generates tokens for a batch.

    Args:
        composition: On a mesh, of one vocabulary.
        params: The arrays' shapes.
        rows: Rows decoded together.
        capacity: Slots per row.
        proposer: Where proposals come from.

    Returns:
        The lowered program; `compile` it.
    """
    programs: Any = build_programs(composition, proposer)
    whole = _whole(composition)
    state: DecodeState = programs.empty.eval_shape(rows=rows, capacity=capacity, stop_ids=_STOP_IDS)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    stopped = jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=whole)
    return programs.decode_chunk.lower(params, state, number, stopped, number)


def _connected(network: Network, scheme: ConnectionScheme) -> Network:
    return dataclasses.replace(network, scheme=scheme)


def _whole(composition: Composition) -> NamedSharding:
    layout = composition.base.layout
    assert layout is not None, "shapes are placed on a mesh"
    return replicated(layout.mesh)


def _request_shapes(composition: Composition, rows: int) -> Requests:
    whole = _whole(composition)

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    floats = array(rows, dtype=jnp.float32)
    keys = jax.eval_shape(row_keys, array(rows), array(rows))
    placed_keys: Any = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=whole)
    return Requests(
        prompt_lengths=array(rows),
        limits=array(rows),
        stop_ids=array(rows, _STOP_IDS),
        strengths=array(rows, len(composition.values), dtype=jnp.float32),
        keys=placed_keys,
        sampling=Sampling(floats, array(rows), floats, floats),
    )
