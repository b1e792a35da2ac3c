"""From checked names to a composed model: every command line that decodes loads it here.

In: checked sources, and how their arrays are held. Out: a `ComposedModel`.
"""

import dataclasses
import gc
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.compatibility import ComposedSources, check_sources
from ivl_jax.composed.kernel_form import lay_out_network, loading_form
from ivl_jax.composed.sources import (
    ModelSource,
    load_schemes,
    read_language_model,
    read_values,
)
from ivl_jax.composed.strength_policies import check_policy
from ivl_jax.config import ComposedModelConfig, MeshConfig
from ivl_jax.decoding.compose import compose_loaded
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.model.network import Architecture
from ivl_jax.sharding import LAYOUTS, ShardingRules, make_mesh
from ivl_jax.weights.language_model import LanguageModel

logger = logging.getLogger(__name__)


def read_sources(config: ComposedModelConfig) -> ComposedSources:
    """Read and check the models that flags name, and whether they fit, without reading a weight.

    Args:
        config: names folders, maps, connection schemes and the draft.

    Returns:
        The checked models.

    Raises:
        FileNotFoundError: no such base model, value folder or draft.
        ValueError: no such strength policy; a value folder or a map has an unknown format version
            or does not fit the base; if a map is needed, the message gives the command that builds
            it.
    """
    check_policy(config.policy, where="--strength-policy")
    base = read_language_model(config.base, role="the base")
    values = read_values(
        config.value,
        config.map,
        schemes=load_schemes(config.connection),
        models=config.value_model,
    )
    path = config.draft_model
    draft = read_language_model(path, role="the draft") if path else None
    return check_sources(base, values, draft=draft, ngrams=config.drafts_ngrams)


def decoding_mesh(
    config: MeshConfig, base: Architecture, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """Make the mesh that flags ask for; None where one device needs none.

    With `tensor` = −1, the default, as many devices split heads, MLP width and vocabulary as the
    base's heads can use: query heads divide over them, and kv heads, or they over kv heads (caches
    are then split into rows, too). The other devices hold copies, with rows of their own: 9 query
    and 3 kv heads on 8 devices are 8 copies, on 6 devices 2 of 3 parts each.

    Args:
        config: the flags.
        base: architecture of the base.
        devices: to make it of; None: those of this process, or of all that compute as one.

    Returns:
        The mesh.

    Raises:
        ValueError: it does not fit the devices.
    """
    sizes, count = dataclasses.asdict(config), len(devices or jax.devices())
    if count == 1 and max(sizes.values()) <= 1:
        return None
    fixed = config.data * config.fsdp
    if config.tensor == -1 and fixed >= 1 and count % fixed == 0:
        sizes["tensor"] = usable_tensor_ways(base, count // fixed)
        copies = count // fixed // sizes["tensor"]
        if copies > 1:
            sizes["data"] *= copies
            logger.info(
                "mesh: tensor=%d, as %d query and %d kv heads do not divide over %d devices; "
                "data=%d copies of the weights decode rows of their own",
                sizes["tensor"],
                base.num_attention_heads,
                base.num_key_value_heads,
                count // fixed,
                sizes["data"],
            )
    return make_mesh(**sizes, devices=devices)


def usable_tensor_ways(base: Architecture, devices: int) -> int:
    """The most of these devices over which a base's heads can be split.

    Args:
        base: its architecture.
        devices: at most as many.

    Returns:
        The largest divisor of `devices` for which each part has its own query heads, and its own
        kv heads or a kv head of its own rows.
    """
    heads, kv_heads = base.num_attention_heads, base.num_key_value_heads

    def fits(ways: int) -> bool:
        shared = kv_heads % ways == 0 or (kv_heads and ways % kv_heads == 0)
        return devices % ways == 0 and heads % ways == 0 and bool(shared)

    return max(ways for ways in range(1, devices + 1) if fits(ways))


def spare_the_collector() -> None:
    """Let Python's garbage collector look no more at what start-up has made so far.

    Modules and tokenizers are a million objects that live to the end; walking them, again and again
    while programs are traced, took 0.9 s of the 3.3 s from loading to the first text. Called before
    weights are loaded, which are none of them.
    """
    gc.freeze()


def load_composed(
    sources: ComposedSources, config: ComposedModelConfig, *, mesh: Mesh | None
) -> ComposedModel:
    """Load base, value networks and draft, and compose them.

    Args:
        sources: the models, checked against each other.
        config: how their arrays are held, and how they are composed.
        mesh: of `decoding_mesh`.

    Returns:
        The composed model.

    Raises:
        ValueError: weights that do not fit.
    """
    param_dtype = jnp.dtype(config.dtype)
    base_rules, value_rules = LAYOUTS[config.base_layout], LAYOUTS[config.value_layout]
    start = time.perf_counter()
    spare_the_collector()

    def load(source: ModelSource, rules: ShardingRules, *, int8: bool = False) -> Any:
        return source.load(
            param_dtype=param_dtype,
            form=loading_form(mesh, int8=int8),
            mesh=mesh,
            sharding_rules=rules,
        )

    # The values first: they are small, and a damaged one is found before the base is read.
    values = [in_decoding_form(load(source, value_rules), mesh) for source in sources.values]
    base = load(sources.base, base_rules, int8=config.int8_base)
    draft = sources.draft and load(sources.draft, value_rules)
    every = [sources.base, *sources.values, *([sources.draft] if sources.draft else [])]
    names = " and ".join(source.path for source in every)
    logger.info("loaded %s in %.1f s", names, time.perf_counter() - start)
    return compose_loaded(
        sources,
        base,
        values,
        draft,
        strengths=config.strength,
        policy=config.policy,
        mesh=mesh,
        base_rules=base_rules,
        value_rules=value_rules,
        draft_length=config.draft_length,
        int8_base=config.int8_base,
    )


def in_decoding_form(
    value: LanguageModel | ValueNetwork, mesh: Mesh | None
) -> LanguageModel | ValueNetwork:
    """Lay a value network out for decoding, as soon as it is loaded.

    One at a time is then held in both forms, not all of them.

    Args:
        value: as loaded.
        mesh: where it will decode; on one it is laid out later, with its layout.

    Returns:
        The value network.
    """
    if mesh is not None or isinstance(value, LanguageModel):
        return value
    return dataclasses.replace(value, params=lay_out_network(value.params, value.arch, None)[1])
