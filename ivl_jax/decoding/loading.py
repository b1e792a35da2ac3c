"""From checked names to a composed model: every command line that decodes loads it here.

In: the base's name, value sources, where arrays live. Out: a `ComposedModel`.
"""

import dataclasses
import gc
import logging
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivl_jax.composed.kernel_form import loading_form
from ivl_jax.config import LayoutName, MeshConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.value_sources import ValueSource, load_source
from ivl_jax.sharding import LAYOUTS, make_mesh
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)


def decoding_mesh(config: MeshConfig) -> Mesh | None:
    """Make the mesh that flags ask for; None where one device needs none.

    Raises:
        ValueError: it does not fit the devices.
    """
    sizes = dataclasses.asdict(config)
    if len(jax.devices()) == 1 and max(sizes.values()) <= 1:
        return None
    return make_mesh(**sizes)


def spare_the_collector() -> None:
    """Let Python's garbage collector look no more at what start-up has made so far.

    Modules and tokenizers are a million objects that live to the end; walking them, again and again
    while programs are traced, took 0.9 s of the 3.3 s from loading to the first text. Called before
    weights are loaded, which are none of them.
    """
    gc.freeze()


def load_composed(
    base: str,
    sources: Sequence[ValueSource],
    *,
    strengths: Sequence[float],
    dtype: str,
    mesh: Mesh | None,
    base_layout: LayoutName,
    value_layout: LayoutName,
    int8_base: bool,
    draft: str = "",
    draft_length: int = 0,
) -> ComposedModel:
    """Load base, value networks and draft, and compose them.

    Args:
        base: folder or hub id.
        sources: the value networks, checked against the base.
        strengths: as `compose` takes them, like `int8_base` and `draft_length`.
        dtype: of parameters and computation.
        mesh: of `decoding_mesh`.
        base_layout: how the base's parameters are split on it.
        value_layout: how the value networks' and the draft's are.
        int8_base: round the base's kernels to int8.
        draft: folder or hub id of a base that proposes tokens; empty: none.
        draft_length: tokens it proposes at a time.

    Returns:
        The composed model.

    Raises:
        ValueError: weights that do not fit.
    """
    param_dtype = jnp.dtype(dtype)
    base_rules, value_rules = LAYOUTS[base_layout], LAYOUTS[value_layout]
    start = time.perf_counter()
    spare_the_collector()
    # The values first: they are small, and a damaged one is found before the base is read.
    values = [
        load_source(source, dtype=param_dtype, mesh=mesh, rules=value_rules) for source in sources
    ]
    base_model = load_language_model(
        base,
        param_dtype=param_dtype,
        form=loading_form(mesh, int8=int8_base),
        mesh=mesh,
        sharding_rules=base_rules,
    )
    draft_model = None
    if draft:
        draft_model = load_language_model(
            draft,
            param_dtype=param_dtype,
            form=loading_form(mesh),
            mesh=mesh,
            sharding_rules=value_rules,
        )
    names = " and ".join([base, *(source.path for source in sources), *([draft] if draft else [])])
    logger.info("loaded %s in %.1f s", names, time.perf_counter() - start)
    return compose(
        base_model,
        *values,
        strengths=strengths,
        maps=[source.described_map for source in sources],
        mesh=mesh,
        base_rules=base_rules,
        value_rules=value_rules,
        int8_base=int8_base,
        draft=draft_model,
        draft_length=draft_length,
    )
