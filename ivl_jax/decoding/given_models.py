"""Models as callers give them: loaded, or by folder or hub id.

In: a model or a path. Out: its source, without its weights; or a TypeError that says what is
expected.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ivl_jax.checkpoint import ValueNetwork
from ivl_jax.composed.sources import (
    ModelSource,
    Schemes,
    read_language_model,
    read_value,
    source_of,
)
from ivl_jax.vocabulary.mapping import DescribedMap
from ivl_jax.weights.language_model import LanguageModel


def is_path(given: Any) -> bool:
    """Say whether a model was given by its folder or hub id."""
    return isinstance(given, str | os.PathLike)


def language_model_source(given: Any, role: str) -> ModelSource:
    """The source of a base or of a draft.

    Args:
        given: a `LanguageModel`, or the path of one.
        role: what messages call it.

    Returns:
        The source.

    Raises:
        TypeError: neither.
        FileNotFoundError: no language model at the path.
        ValueError: its files are not what they should be.
    """
    if isinstance(given, LanguageModel):
        return source_of(given, f"{role} {given.path}")
    if is_path(given):
        return read_language_model(os.fspath(given), role=role)
    hint = ""
    if isinstance(given, ValueNetwork):
        hint = "; the base comes first: compose(base, value)"
    raise TypeError(
        f"{role}: expected a language model (ivl_jax.load_model), or the folder or hub id of one, "
        f"got {_kind(given)}{hint}"
    )


def value_source(
    given: Any,
    index: int,
    *,
    described_map: DescribedMap | None,
    schemes: Schemes,
    models: Sequence[str] = (),
) -> ModelSource:
    """The source of a value network, or of a language model in the place of one.

    Args:
        given: a `ValueNetwork`, a `LanguageModel`, or the path of one.
        index: which of the value networks it is.
        described_map: the vocabulary map that it needs on the base, or None.
        schemes: as `read_value` takes them.
        models: as `read_value` takes them.

    Returns:
        The source.

    Raises:
        TypeError: neither of these.
        FileNotFoundError: no such model at the path.
        ValueError: its files are not what they should be, or its connection scheme is not known.
    """
    name = f"value network {index + 1}"
    if isinstance(given, LanguageModel):
        label = f"{name} (the language model {given.path})"
    elif isinstance(given, ValueNetwork):
        trained_on = given.metadata.training_base.get("name", "an unnamed base")
        label = f"{name} (trained on {trained_on})"
    elif is_path(given):
        source = read_value(os.fspath(given), schemes=schemes, models=models)
        return dataclasses.replace(
            source, label=f"{name} ({source.path})", described_map=described_map
        )
    else:
        hint = "; give several one by one: compose(base, first, second)"
        raise TypeError(
            f"{name}: expected a value network (ivl_jax.load_value), a language model, or the "
            f"folder of one, got {_kind(given)}{hint if isinstance(given, list | tuple) else ''}"
        )
    return source_of(given, label, described_map=described_map, schemes=schemes)


def _kind(given: Any) -> str:
    return "a ValueNetwork" if isinstance(given, ValueNetwork) else f"{given!r:.60}"
