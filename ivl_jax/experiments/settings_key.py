"""What an experiment's result depends on, as a hash: what is kept under it is not made again.

In: the config of a training. Out: its key.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from ivl_jax.assets import family_folder
from ivl_jax.config import TrainConfig
from ivl_jax.config.files import config_to_mapping
from ivl_jax.weights.fingerprint import weights_fingerprint

FamilyModel = Literal["S", "L", "X"]
_UNKEYED = ("run_dir", "resume", "logging", "compilation_cache", "profile", "processes")


@functools.cache
def family_weights(model: FamilyModel) -> str:
    """SHA-256 of a family model's weights, by which results on others are told apart."""
    return weights_fingerprint(family_folder(model))


def hash_of(parts: object) -> str:
    """SHA-256 of something's JSON; what JSON does not know counts as its text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def settings_key(
    config: TrainConfig, *, work_dir: Path, models: Mapping[Path, str] = MappingProxyType({})
) -> str:
    """A hash of everything in a config that its result depends on.

    Fields that have their defaults do not count: a later version's new field changes no key. Models
    of the family count by their weights.

    Args:
        config: Of a run; the names of the files it reads identify their content.
        work_dir: Of the study: where it lies does not count.
        models: Folders of models that a study makes, and what identifies each.

    Returns:
        64 hexadecimal digits.
    """
    mapping = _changed(config_to_mapping(config), config_to_mapping(TrainConfig()))
    text = json.dumps({k: x for k, x in mapping.items() if k not in _UNKEYED}, sort_keys=True)
    names = {**models, work_dir: "WORK"}
    names |= {
        family_folder(model): f"{model} {family_weights(model)}" for model in get_args(FamilyModel)
    }
    for folder, name in names.items():
        text = text.replace(json.dumps(str(folder))[1:-1], name)
    return hashlib.sha256(text.encode()).hexdigest()


def _changed(mapping: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that differ from the defaults, at every level."""
    found = {}
    for key, value in mapping.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _changed(value, default)
            if not value:
                continue
        elif value == default:
            continue
        found[key] = value
    return found
