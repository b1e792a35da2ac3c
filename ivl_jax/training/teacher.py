"""The teacher of a distillation: a frozen model or composition with the student's tokens.

In: the config's `distil` table. Out: first its sources, checked without weights; later its networks
and parameters on the mesh.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ivl_jax.composed.attention import attention_on_mesh
from ivl_jax.composed.compatibility import ComposedSources, check_sources
from ivl_jax.composed.network import ComposedParams, Composition, Layout, Network, ValueArrays
from ivl_jax.composed.sources import ModelSource, read_language_model, read_value
from ivl_jax.config import ConfigError, DistilConfig, DType
from ivl_jax.model.network import build_network
from ivl_jax.sharding import DEFAULT_RULES, replicated
from ivl_jax.tokenizer_agreement import TokenizerMismatchError
from ivl_jax.training.teacher_vocabulary import check_teacher_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A teacher whose weights have been read."""

    composition: Composition
    strengths: tuple[float, ...]
    params: ComposedParams
    shardings: ComposedParams


TeacherReader = Callable[[DistilConfig, Sequence[ModelSource]], ComposedSources]
"""(options, students) → a teacher without its weights."""


def read_teacher(options: DistilConfig, students: Sequence[ModelSource]) -> ComposedSources:
    """Find a teacher and check everything that needs no weights.

    Args:
        options: of the config.
        students: the models in whose vocabulary the student predicts: its bases, or itself.

    Returns:
        The teacher's models.

    Raises:
        FileNotFoundError: no such folder or hub id, also of the model of a LoRA value.
        ConfigError: the teacher or one of its value networks has another vocabulary than a student;
            special and appended tokens that only the teacher has are dropped with a warning.
    """
    try:
        sources = check_sources(
            read_language_model(options.teacher, revision=options.revision, role="the teacher"),
            [read_value(path, models=options.value_models) for path in options.values],
        )
        for student in students:
            check_teacher_vocabulary(sources.base, student)
    except TokenizerMismatchError as error:
        raise ConfigError(
            f"distil.values: a value network of another vocabulary than distil.teacher = "
            f"{options.teacher} reads the text in its own tokens, anew after each of the "
            "teacher's, which only decoding does: name values of the teacher's family; or let the "
            "composition answer the prompts (infer.py --map … --output …) and train on its "
            f"answers: docs/distillation.md. {error}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"distil.teacher = {options.teacher}: {error}") from error
    return sources


def load_teacher(
    options: DistilConfig, sources: ComposedSources, *, compute_dtype: DType, mesh: Mesh
) -> Teacher:
    """Read a teacher's weights onto the mesh.

    Args:
        options: of the config.
        sources: from `read_teacher`.
        compute_dtype: of its activations.
        mesh: the device mesh.

    Returns:
        The teacher.
    """
    everywhere = replicated(mesh)

    def load(source: ModelSource) -> Any:
        logger.info("loading %s of the teacher", source.path)
        return source.load(
            param_dtype=jnp.dtype(options.param_dtype),
            mesh=mesh,
            sharding_rules=DEFAULT_RULES,
        ).params

    base_params = load(sources.base)
    arrays = tuple(
        ValueArrays(
            load(source),
            jax.device_put(np.asarray(ids, np.int32), everywhere) if ids else None,
        )
        for source, ids in zip(sources.values, sources.unknown_ids, strict=True)
    )
    params = ComposedParams(base_params, arrays)
    return Teacher(
        teacher_composition(sources, compute_dtype=compute_dtype, mesh=mesh),
        teacher_strengths(options),
        params,
        jax.tree.map(lambda leaf: leaf.sharding, params),
    )


def teacher_composition(
    sources: ComposedSources, *, compute_dtype: DType, mesh: Mesh
) -> Composition:
    """Make the static half of a teacher.

    Args:
        sources: from `read_teacher`.
        compute_dtype: of its activations.
        mesh: the device mesh.

    Returns:
        Its networks.
    """
    layout, dtype = Layout(mesh, DEFAULT_RULES), jnp.dtype(compute_dtype)

    def network(source: ModelSource) -> Network:
        return Network(
            build_network(
                source.arch,
                compute_dtype=dtype,
                attention=attention_on_mesh(source.arch, layout, dtype=dtype),
            ),
            source.arch,
            source.info.vocab_size,
            scheme=None if source is sources.base else source.scheme,
            replacement_id=source.info.replacement_id,
            layout=layout,
        )

    return Composition(network(sources.base), tuple(network(one) for one in sources.values))


def teacher_strengths(options: DistilConfig) -> tuple[float, ...]:
    """α of each of the teacher's value networks."""
    return options.strengths or (1.0,) * len(options.values)
