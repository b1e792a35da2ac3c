"""What a value folder says about itself: `ivl.json`.

In: a value folder, or what a training run knows about its value network. Out: `ValueMetadata`, read
without JAX and without touching any array.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata as packages
from typing import Any

from etils import epath

from ivl_jax.config import CONNECTIONS, is_connection

METADATA_NAME = "ivl.json"
FORMAT_VERSION = 1
# Entry of ivl.json → its JSON type, in the order of writing.
_KINDS: dict[str, type] = {
    "format_version": int,
    "connection": str,
    "architecture": dict,
    "penalty": dict,
    "training_base": dict,
    "steps": int,
    "chat_template": str,
    "stop_ids": list,
    "tokenizer": dict,
    "library_versions": dict,
}
_PACKAGES = ("ivl_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class ValueFolderError(ValueError):
    """A value folder that cannot be used: where, expected, found, remedy."""


def library_versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that shape a checkpoint."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:  # ivl_jax itself, run from its sources
            versions[name] = "not installed"
    return versions


@dataclass(frozen=True, kw_only=True)
class ValueMetadata:
    """Everything about a value network but its arrays and its tokenizer's files.

    Attributes:
        architecture: the network's `config.json`, or the sizes of a linear map: what
            `architecture_to_json` gives.
        connection: name of the connection scheme, such as `residual`; or `module:attribute` of one
            that is not part of the package.
        penalty: the penalty it was trained with: `kind`, `weight`, `positions`.
        tokenizer: `TokenizerInfo.to_json`; its fingerprint decides which bases fit.
        training_base: the base it was trained beside: `name` and `fingerprint`.
        chat_template: a named format (`llama-2`, `chatml`, …), `auto` for the template in the
            tokenizer's own files, or a template's text.
        stop_ids: every token id that ends a text, the `generation_config.json` list included.
        steps: optimizer steps taken.
        library_versions: package → version that wrote the folder.
        format_version: of the folder.
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
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Give the content of `ivl.json`."""
        return {name: getattr(self, name) for name in _KINDS} | {"stop_ids": list(self.stop_ids)}


def read_value_metadata(folder: epath.PathLike) -> ValueMetadata:
    """Read `ivl.json`, and nothing else, of a value folder.

    Args:
        folder: the value folder, local or a URL that `etils.epath` reads.

    Returns:
        What it says; hashes are not checked (`load_value` does).

    Raises:
        FileNotFoundError: the folder has no `ivl.json`.
        ValueFolderError: it is not JSON, of a format version this package does not read, or has a
            missing, unknown or impossible entry.
    """
    path = epath.Path(folder) / METADATA_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: {folder} is not a value folder; a training run writes one to "
            "`RUN_DIR/value`, and `python -m ivl_jax.checkpoint export-value RUN_DIR OUT` makes "
            "one from a checkpoint"
        ) from None
    except ValueError as error:
        raise ValueFolderError(f"{path} is not JSON ({error}): copy the folder again") from None
    if not isinstance(content, dict):
        raise ValueFolderError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return _from_json(content, path)


def _from_json(content: Mapping[str, Any], path: epath.Path) -> ValueMetadata:
    found_version = content.get("format_version")
    if found_version != FORMAT_VERSION:
        raise ValueFolderError(
            f"{path}: format_version {found_version!r}, this version of ivl_jax reads "
            f"{FORMAT_VERSION}: install the ivl_jax that wrote it "
            f"({_writer(content)}) or export the value network again with this one"
        )
    problems = [f"{name}: missing" for name in _KINDS if name not in content]
    problems += [f"{name}: unknown" for name in content if name not in _KINDS]
    problems += [
        f"{name}: expected {kind.__name__}, found {type(content[name]).__name__}"
        for name, kind in _KINDS.items()
        if name in content and type(content[name]) is not kind
    ]
    if not is_connection(str(content.get("connection"))):
        problems.append(
            f"connection: expected one of {', '.join(CONNECTIONS)}, "
            f"found {content.get('connection')!r}"
        )
    if not all(type(stop) is int for stop in content.get("stop_ids") or ()):
        problems.append(f"stop_ids: expected integers, found {content['stop_ids']}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueFolderError(
            f"{path} is not what format_version {FORMAT_VERSION} says:{listed}\n"
            "copy the folder again, or export the value network again"
        )
    return ValueMetadata(**{**content, "stop_ids": tuple(content["stop_ids"])})


def _writer(content: Mapping[str, Any]) -> str:
    versions = content.get("library_versions")
    version = versions.get("ivl_jax") if isinstance(versions, dict) else None
    return f"version {version}" if version else "its version is not recorded"
