"""TOML files to config dataclasses and back, strictly.

In: a TOML file or nested mappings. Out: a config dataclass; every unknown key or mistyped value is
an error that names it. Imports no JAX.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ivl_jax.config import ConfigError, TrainConfig

ConfigT = TypeVar("ConfigT")


def load_config(path: str | Path, config_type: type[ConfigT] = TrainConfig) -> ConfigT:
    """Read a TOML file into a config dataclass.

    Args:
        path: TOML file; tables are nested dataclasses, keys are field names.
        config_type: the dataclass to build.

    Returns:
        The config, every field either from the file or the dataclass's default.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (the closest known one is named), a
            value of another type, or a failed cross-field check.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in path.parent.glob("*.toml")))
        beside = f"; beside it there are: {known}" if known else ""
        raise ConfigError(f"no config file at {path}{beside}")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return config_from_mapping(document, config_type, where=str(path))


def config_from_mapping(
    document: Mapping[str, Any], config_type: type[ConfigT] = TrainConfig, *, where: str = "config"
) -> ConfigT:
    """Build a config dataclass from nested mappings, strictly.

    Args:
        document: field names to values; nested mappings for nested dataclasses.
        config_type: the dataclass to build.
        where: names the source in errors.

    Returns:
        The config.

    Raises:
        ConfigError: an unknown key, a value of another type, or a failed cross-field check.
    """
    return _build(config_type, document, where, "")


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Turn a config into nested dicts of plain values; fields that are None are left out.

    Args:
        config: a config dataclass.

    Returns:
        What `config_from_mapping` reads back to an equal config.
    """
    return {
        f.name: _plain(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) is not None
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_mapping(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def config_to_toml(config: Any) -> str:
    """Write a config as TOML text that `load_config` reads back to an equal config.

    Args:
        config: a config dataclass.

    Returns:
        TOML, plain keys first, then one table a nested dataclass (or a list of tables).
    """
    return "\n".join(_toml_lines(config_to_mapping(config), ""))


def _toml_lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    nested = {key: value for key, value in table.items() if _tables(value)}
    # A JSON string, number or list of strings is also valid TOML.
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in table.items()
        if key not in nested
    ]
    for key, value in nested.items():
        heading = f"[{prefix}{key}]" if isinstance(value, dict) else f"[[{prefix}{key}]]"
        for one in _tables(value):
            lines += ["", heading, *_toml_lines(one, f"{prefix}{key}.")]
    return lines


def _tables(value: Any) -> Sequence[dict[str, Any]]:
    """The tables that a value is written as; none for a plain value."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, tuple) and value and isinstance(value[0], dict) else []


def _build(config_type: type, document: Mapping[str, Any], where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(config_type)
    for key in document:
        if key not in hints:
            close = difflib.get_close_matches(key, list(hints), n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(hints)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {remedy}")
    values = {}
    for key, value in document.items():
        values[key] = _checked(value, hints[key], where, f"{prefix}{key}")
    try:
        return config_type(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _checked(value: Any, hint: Any, where: str, name: str) -> Any:
    """Return the value in the field's type, or raise; int is taken for float, list for tuple."""
    what = f"{where}: {name}"
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{what} must be a table, got {value!r}")
        return _build(typing.cast(type, hint), value, where, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise ConfigError(f"{what} must be one of {choices}; got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where, name)
    if origin is tuple:
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
