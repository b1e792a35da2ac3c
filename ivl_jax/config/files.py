"""TOML files to config dataclasses and back, strictly.

In: a TOML file or nested mappings. Out: a config dataclass; every unknown key or mistyped value is
an error that names it. Does not import JAX.
"""

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ivl_jax.config.annotations import INLINE, is_marked
from ivl_jax.config.checks import ConfigError, number_problem
from ivl_jax.config.train import TrainConfig

ConfigT = TypeVar("ConfigT")

# Keys that earlier versions took as booleans, in files and as flags, and their words today.
EARLIER_BOOLEANS = {"step.remat": {False: "none", True: "full"}}


def load_config(path: str | Path, config_type: type[ConfigT] = TrainConfig) -> ConfigT:
    """Read a TOML file into a config dataclass.

    Args:
        path: TOML file, local or a gs:// URL; tables are nested dataclasses, keys are field names.
        config_type: the dataclass to build.

    Returns:
        The config, every field either from the file or the dataclass's default.

    Raises:
        ConfigError: no such file, not UTF-8 or not TOML (with the place), an unknown key (names the
            closest known one), a value of the wrong type, or a failed cross-field check.
    """
    if "://" in str(path):
        return _load_url(str(path), config_type)
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.toml")))
        others = f"; this folder has: {known}" if known else ""
        raise ConfigError(f"no config file at {path}{others}")
    return _load(path, config_type)


def _load_url(url: str, config_type: type[ConfigT]) -> ConfigT:
    from ivl_jax.paths import usable_path

    path = usable_path(url)
    if not path.exists():
        raise ConfigError(f"no config file at {path}")
    return _load(path, config_type)


def _load(path: Any, config_type: type[ConfigT]) -> ConfigT:
    # Imported here: it takes longer to import than all configs.
    from ivl_jax.toml_files import MalformedFileError, read_toml

    try:
        document = read_toml(path)
    except MalformedFileError as error:
        raise ConfigError(str(error)) from error
    return config_from_mapping(document, config_type, where=str(path))


def train_config_of(given: Any) -> TrainConfig:
    """Take a training config in any form whose meaning is plain.

    Args:
        given: a `TrainConfig`, the path of a TOML file, or a mapping of what such a file holds.

    Returns:
        The config.

    Raises:
        TypeError: something else.
        ConfigError: as `load_config`.
    """
    if isinstance(given, TrainConfig):
        return given
    if isinstance(given, str | os.PathLike):
        return load_config(os.fspath(given))
    if isinstance(given, Mapping):
        return config_from_mapping(given)
    raise TypeError(
        "expected a TrainConfig, the path of a TOML file such as configs/debug.toml, or a mapping "
        f"of what it holds, got {given!r:.60}"
    )


def config_from_mapping(
    document: Mapping[str, Any], config_type: type[ConfigT] = TrainConfig, *, where: str = "config"
) -> ConfigT:
    """Build a config dataclass from nested mappings, strictly.

    Args:
        document: field names to values; nested mappings for nested dataclasses.
        config_type: the dataclass to build.
        where: what errors call the document.

    Returns:
        The config.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a failed cross-field check.
    """
    return _build(config_type, document, where, "")


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Turn a config into nested dicts of plain values; fields that are None are left out.

    Args:
        config: a config dataclass.

    Returns:
        What `config_from_mapping` reads back to an equal config.
    """
    hints = _annotated_types(type(config))
    mapping: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if is_marked(hints[field.name], INLINE):
            mapping |= config_to_mapping(value)
        elif value is not None:
            mapping[field.name] = _plain(value)
    return mapping


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_mapping(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def config_to_toml(config: Any) -> str:
    """Write a config as TOML text that `load_config` reads back to an equal config.

    Args:
        config: a config dataclass.

    Returns:
        TOML, plain keys first, then one table per nested dataclass (or a list of tables).
    """
    return "\n".join(_toml_lines(config_to_mapping(config), ""))


def _toml_lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    nested = {key: value for key, value in table.items() if _tables(value)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if key not in nested]
    for key, value in nested.items():
        heading = f"[{prefix}{key}]" if isinstance(value, dict) else f"[[{prefix}{key}]]"
        for one in _tables(value):
            lines += ["", heading, *_toml_lines(one, f"{prefix}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    """A JSON string, number or list of strings is also valid TOML, except for the DEL character."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _tables(value: Any) -> Sequence[dict[str, Any]]:
    """The tables that a value is written as; empty for a plain value."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, tuple) and value and isinstance(value[0], dict) else []


def field_types(config_type: type) -> dict[str, Any]:
    """The type of every key that a config dataclass is read from.

    Args:
        config_type: the dataclass.

    Returns:
        Key → type without annotations; the fields of inline dataclasses are among the others.
    """
    types_of: dict[str, Any] = {}
    for name, hint in _annotated_types(config_type).items():
        if is_marked(hint, INLINE):
            types_of |= field_types(hint.__origin__)
        else:
            types_of[name] = _without_annotations(hint)
    return types_of


@functools.cache
def _annotated_types(config_type: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with the marks on them."""
    return typing.get_type_hints(config_type, include_extras=True)


def _without_annotations(hint: Any) -> Any:
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _build(config_type: type, document: Mapping[str, Any], where: str, prefix: str) -> Any:
    known = field_types(config_type)
    for key in document:
        if key not in known:
            import difflib  # a tenth of the import time of all configs

            close = difflib.get_close_matches(key, list(known), n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {remedy}")
    values = {
        key: _checked(value, known[key], where, f"{prefix}{key}") for key, value in document.items()
    }
    try:
        return _construct(config_type, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _construct(config_type: type, values: Mapping[str, Any], default: Any = None) -> Any:
    """Make a dataclass, and its inline dataclasses, from the values of all their fields."""
    hints = _annotated_types(config_type)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if is_marked(hint, INLINE):
            made = field.default_factory
            inner = made() if made is not dataclasses.MISSING else None
            fields[field.name] = _construct(hint.__origin__, values, inner)
        elif field.name in values:
            fields[field.name] = values[field.name]
    return config_type(**fields) if default is None else dataclasses.replace(default, **fields)


def _checked(value: Any, hint: Any, where: str, name: str) -> Any:
    """Return the value in the field's type, or raise; accepts int for float and list for tuple."""
    what = f"{where}: {name}"
    if problem := number_problem(value):
        raise ConfigError(f"{what} {problem}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{what} must be a table, got {value!r}")
        return _build(typing.cast(type, hint), value, where, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, bool):
            value = EARLIER_BOOLEANS.get(name, {}).get(value, value)
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise ConfigError(f"{what} must be one of {choices}; got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where, name)
    if origin in (tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{what} must be a list, got {value!r}")
        return tuple(
            _checked(item, arguments[0], where, f"{name}[{i}]") for i, item in enumerate(value)
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{what} must be {hint.__name__}, got {value!r}")
    return value
