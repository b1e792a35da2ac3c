"""The `--model_args` of the harness model `ivl`.

In: names and values as parsed by the harness. Out: the models, and options for running them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ivl_jax.config import ConfigError, MeshConfig, config_from_mapping
from ivl_jax.evaluation.flags import ModelFlags

DEFAULT_BATCH_SIZE = 16  # if the harness passes "auto" or nothing
_LISTS = ("value", "strength", "map", "value_model", "connection")
_MESH = tuple(field.name for field in dataclasses.fields(MeshConfig))
_OPTIONS = ("batch_size", "max_length", "seed")


def read_arguments(given: Mapping[str, Any]) -> tuple[ModelFlags, dict[str, Any]]:
    """Read `--model_args`.

    Args:
        given: name → value, as parsed by the harness; one value or a list for `value`, `strength`,
            `map`, `value_model` and `connection`.

    Returns:
        The models, and keyword arguments of `IvlLM`.

    Raises:
        ConfigError: an unknown name (names the closest known one) or a value of the wrong type.

    Example:
        >>> flags, options = read_arguments({"base": "B", "value": "V", "strength": 0.5})
        >>> flags.composed.value, flags.composed.strength, options
        (('V',), (0.5,), {})
    """
    options = {name: given[name] for name in _OPTIONS if name in given}
    mesh = {name: given[name] for name in _MESH if name in given}
    fields = {k: v for k, v in given.items() if k not in options and k not in mesh}
    for name in set(_LISTS) & set(fields):
        if not isinstance(fields[name], list | tuple):
            fields[name] = [fields[name]]
    if "batch_size" in options:
        options["batch_size"] = _batch_size(options["batch_size"])
    default_mesh = dataclasses.asdict(ModelFlags().composed.mesh)
    flags = config_from_mapping(
        fields | {"mesh": default_mesh | mesh}, ModelFlags, where="--model_args of ivl"
    )
    return flags, options


def _batch_size(given: Any) -> int:
    if str(given).startswith("auto"):
        return DEFAULT_BATCH_SIZE
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError(f"batch_size: expected a number ≥ 1 or auto, got {given!r}")
    return int(given)
