"""The metadata of a value folder: `ivl.json`.

In: a value folder, or what a training run knows about its value network. Out: `ValueMetadata`, read
without JAX and without touching any array.
"""

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata as packages
from typing import Any, get_args

from etils import epath

from ivl_jax.config import CONNECTIONS, LoraTargets, is_connection
from ivl_jax.json_files import json_kind, read_json_object
from ivl_jax.manifest import shorten
from ivl_jax.paths import usable_path

logger = logging.getLogger(__name__)

METADATA_NAME = "ivl.json"
# 2: the training base's fingerprint is of its weights; in 1 it was of its tokenizer.
FORMAT_VERSION = 2
# 3: the arrays are an adapter's, and `adapter` names the model that it changes.
ADAPTER_FORMAT_VERSION = 3
_OLDEST_READ = 1
_CONNECTION = f"one of {', '.join(CONNECTIONS)} or module:attribute"
# Entry of ivl.json → its expected kind, in the order of writing. A list gives the kind of its
# items, an object that of its entries; an entry whose name ends in "?" may be absent.
_SHAPE: dict[str, Any] = {
    "format_version": "a count",
    "connection": _CONNECTION,
    "architecture": "an object",
    "penalty": {"kind?": "text", "weight?": "a number", "positions?": "text"},
    "training_base": {"name?": "text", "fingerprint?": "text"},
    "steps": "a count",
    "chat_template": "text",
    "stop_ids": ["a count"],
    "tokenizer": {
        "vocab_size": "a count",
        "fingerprint": "text",
        "special_tokens": "an object, id to text",
        "bos_id": "a count or null",
        "eos_ids": ["a count"],
        "pad_id": "a count",
        "unk_id": "a count or null",
    },
    "library_versions": "an object of texts",
}
_TARGETS = f"one of {', '.join(get_args(LoraTargets))}"
_ADAPTER_SHAPE = _SHAPE | {
    "adapter": {
        "rank": "a positive count",
        "alpha": "a number",
        "targets": _TARGETS,
        "model": {"name": "text", "revision": "text or null", "fingerprint": "text"},
    }
}
_PACKAGES = ("ivl_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class ValueFolderError(ValueError):
    """A value folder that cannot be used: where, expected, found, remedy."""


def library_versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect a checkpoint."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:  # ivl_jax itself, run from a source tree
            versions[name] = "not installed"
    return versions


@dataclass(frozen=True, kw_only=True)
class ValueMetadata:
    """Everything about a value network except its arrays and its tokenizer's files.

    Attributes:
        architecture: the network's `config.json`, or the sizes of a linear map, as returned by
            `architecture_to_json`.
        connection: name of the connection scheme, such as `residual`; or `module:attribute` of one
            that is not part of the package.
        penalty: the penalty it was trained with: `kind`, `weight`, `positions`.
        tokenizer: `TokenizerInfo.to_json`; its fingerprint decides which bases fit.
        training_base: the base it was trained with: `name`, and the `fingerprint` of its weights
            (`weights_fingerprint`), empty if unknown; with several bases, their joined names and
            combined fingerprints.
        chat_template: a named format (`llama-2`, `chatml`, …), `auto` for the template in the
            tokenizer's own files, or a template's text.
        stop_ids: every token id that ends a text, including the `generation_config.json` list.
        steps: optimizer steps taken.
        library_versions: package → version that wrote the folder.
        adapter: None, or of a LoRA value folder: `rank`, `alpha`, `targets`, and the frozen `model`
            by `name`, `revision` and the `fingerprint` of its weights.
    """

    architecture: dict[str, Any]
    connection: str
    penalty: dict[str, Any]
    tokenizer: dict[str, Any]
    training_base: dict[str, Any]
    chat_template: str
    stop_ids: tuple[int, ...]
    steps: int = 0
    library_versions: dict[str, str] = field(default_factory=library_versions)
    adapter: dict[str, Any] | None = None

    @property
    def format_version(self) -> int:
        """The folder's format version; one without an adapter is what earlier versions read."""
        return FORMAT_VERSION if self.adapter is None else ADAPTER_FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The content of `ivl.json`."""
        shape = _SHAPE if self.adapter is None else _ADAPTER_SHAPE
        return {name: getattr(self, name) for name in shape} | {"stop_ids": list(self.stop_ids)}


def read_value_metadata(folder: epath.PathLike) -> ValueMetadata:
    """Read only `ivl.json` of a value folder.

    Args:
        folder: the value folder, local or a URL that `etils.epath` reads.

    Returns:
        Its content; hashes are not checked (`load_value` does that).

    Raises:
        FileNotFoundError: the folder has no `ivl.json`.
        ValueFolderError: it is not JSON, has a format version that this package does not read, or a
            missing, unknown or invalid entry.
    """
    folder = usable_path(folder)
    path = folder / METADATA_NAME
    try:
        content = read_json_object(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: {folder} is not a value folder; {_remedy(folder)}"
        ) from None
    except ValueError as error:
        raise ValueFolderError(f"{error}; copy the folder again") from None
    return _from_json(content, path)


def _remedy(folder: epath.Path) -> str:
    """What to give instead of a folder that is not a value folder."""
    if (folder / "value" / METADATA_NAME).exists():
        return f"it is the directory of a training run, whose value folder is {folder / 'value'}"
    if (folder / "config.json").exists():
        return "it holds a language model, which ivl_jax.load_model loads"
    return (
        "a training run writes one to `RUN_DIR/value`, and `python -m ivl_jax.checkpoint "
        "export-value RUN_DIR OUT` makes one from a checkpoint"
    )


def _from_json(content: Mapping[str, Any], path: epath.Path) -> ValueMetadata:
    found_version = content.get("format_version")
    newest = ADAPTER_FORMAT_VERSION
    if type(found_version) is not int or not _OLDEST_READ <= found_version <= newest:
        raise ValueFolderError(
            f"{path}: format_version {found_version!r}, this version of ivl_jax reads "
            f"{_OLDEST_READ} to {newest}: install the ivl_jax that wrote it "
            f"({_writer(content)}) or export the value network again with this one"
        )
    shape = _ADAPTER_SHAPE if found_version == ADAPTER_FORMAT_VERSION else _SHAPE
    problems = _problems(content, shape, "")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in shorten(problems))
        raise ValueFolderError(
            f"{path} does not match format_version {found_version}:{listed}\n"
            "copy the folder again, or export the value network again"
        )
    base = content["training_base"]
    if found_version == 1:
        logger.info("%s: format 1 does not record the weights of the training base", path)
        base = base | {"fingerprint": ""}
    current = {"training_base": base, "stop_ids": tuple(content["stop_ids"])}
    entries = {name: value for name, value in content.items() if name != "format_version"}
    return ValueMetadata(**{**entries, **current})


def _problems(value: Any, shape: Any, name: str) -> list[str]:
    """Where a JSON value differs from its expected shape, one line per place."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [_problem(name, "an object", value)]
        known = {key.removesuffix("?"): key for key in shape}
        inside = f"{name}." if name else ""
        problems = [
            f"{inside}{key}: missing"
            for key, marked in known.items()
            if key not in value and key == marked
        ]
        problems += [f"{inside}{key}: unknown" for key in value if key not in known]
        for key, entry in value.items():
            if key in known:
                problems += _problems(entry, shape[known[key]], f"{inside}{key}")
        return problems
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [_problem(name, "a list", value)]
        return [
            problem
            for index, item in enumerate(value)
            for problem in _problems(item, shape[0], f"{name}[{index}]")
        ]
    return [] if _KINDS[shape](value) else [_problem(name, shape, value)]


def _problem(name: str, expected: str, value: Any) -> str:
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    found = repr(value)[:80] if plain else json_kind(value)
    return f"{name}: expected {expected}, got {found}"


def _is_count(value: Any) -> bool:
    """Whether it is a non-negative integer that NumPy can hold; JSON's true is not one."""
    return type(value) is int and 0 <= value < _MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MOST < value < _MOST


def _holds_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _holds_texts_of_ids(value: Any) -> bool:
    ids = value if isinstance(value, dict) else {}
    return _holds_texts(value) and all(key.isascii() and key.isdecimal() for key in ids)


_MOST = 1 << 62
_KINDS: dict[str, Callable[[Any], bool]] = {
    "a count": _is_count,
    "a count or null": lambda value: value is None or _is_count(value),
    "a positive count": lambda value: _is_count(value) and value > 0,
    "a number": _is_number,
    "text": lambda value: isinstance(value, str),
    "text or null": lambda value: value is None or isinstance(value, str),
    _TARGETS: lambda value: isinstance(value, str) and value in get_args(LoraTargets),
    _CONNECTION: lambda value: isinstance(value, str) and is_connection(value),
    "an object": lambda value: isinstance(value, dict),
    "an object of texts": _holds_texts,
    "an object, id to text": _holds_texts_of_ids,
}


def _writer(content: Mapping[str, Any]) -> str:
    versions = content.get("library_versions")
    version = versions.get("ivl_jax") if isinstance(versions, dict) else None
    return f"version {version}" if version else "its version is not recorded"
