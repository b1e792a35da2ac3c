"""The value folder: a self-contained value network for any base.

In: parameters, metadata and tokenizer of a value network. Out: one folder with Orbax arrays,
`ivl.json`, the tokenizer's files and a hash manifest; and the value network back, on any mesh.

    value/
      ivl.json        architecture, connection, penalty, tokenizer fingerprint, training base, …
      params/         the arrays, layers unstacked, exactly the vocabulary's rows; or only those of
                      an adapter, if ivl.json names the model that it belongs to
      tokenizer/      the tokenizer's files, chat template included
      manifest.json   size and SHA-256 of each file; written last
      README.md       a card for people, not sealed: it may be edited
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ivl_jax.checkpoint.adapted_model import find_adapted_model
from ivl_jax.checkpoint.folder_replacement import (
    building_folder,
    finish_replacement,
    is_half_replaced,
)
from ivl_jax.checkpoint.hub import find_value_folder
from ivl_jax.checkpoint.value_arrays import (
    PARAMS_FOLDER,
    load_network,
    stored_arrays,
    value_architecture,
)
from ivl_jax.checkpoint.value_card import UNSEALED, write_card
from ivl_jax.checkpoint.value_metadata import (
    METADATA_NAME,
    ValueFolderError,
    ValueMetadata,
    read_value_metadata,
)
from ivl_jax.checkpoint.value_tokenizer import TOKENIZER_FOLDER, read_tokenizer, write_tokenizer
from ivl_jax.manifest import (
    ManifestError,
    file_problems,
    read_manifest,
    shorten,
    unlisted_files,
    write_manifest,
)
from ivl_jax.model.decoder import Params
from ivl_jax.model.network import Architecture, architecture_from_json
from ivl_jax.paths import absolute_path
from ivl_jax.sharding import DEFAULT_RULES, ShardingRules
from ivl_jax.text_files import shortened
from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any  # importing transformers takes a second

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValueNetwork:
    """A trained value network, ready to be composed with a base.

    Attributes:
        arch: its architecture.
        params: its parameters, layers unstacked; vocabulary rows may be padded with zeros.
        connection: how base and value are connected.
        metadata: the content of its `ivl.json`; without the `adapter`, which is merged.
        tokenizer: from its folder.
        tokenizer_info: what identifies the tokenizer.
        chat_template: a named format, `auto` or a template's text.
        stop_ids: every token id that ends a text.
        path: the folder it came from; empty if made in memory.
    """

    arch: Architecture
    params: Params = field(repr=False)
    connection: str
    metadata: ValueMetadata = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    tokenizer_info: TokenizerInfo = field(repr=False)
    chat_template: str
    stop_ids: tuple[int, ...]
    path: str = ""


def save_value(
    folder: epath.PathLike,
    *,
    params: Params,
    metadata: ValueMetadata,
    tokenizer: PreTrainedTokenizerBase,
    overwrite: bool = False,
) -> None:
    """Write a value folder, which appears only once it is complete.

    Args:
        folder: where, local or a URL that `etils.epath` writes; its parent is created.
        params: parameters on any mesh; stored with layers unstacked and without padding rows. Only
            the adapter's, if the metadata has an `adapter`.
        metadata: the content of `ivl.json`.
        tokenizer: the value network's own; its files are copied.
        overwrite: replace an existing value folder; anything else is never replaced.

    Raises:
        FileExistsError: the folder exists, and `overwrite` is not set or it is not a value folder.
        TreeMismatchError: the parameters do not match the architecture.
        ValueFolderError: the tokenizer does not match the metadata, or has more ids than the
            architecture has vocabulary rows.
    """
    folder = absolute_path(folder)
    arch = architecture_from_json(metadata.architecture)
    check_replaceable(folder, overwrite=overwrite)
    _check_tokenizer(describe_tokenizer(tokenizer), metadata, arch, "the tokenizer to be saved")
    stored = stored_arrays(params, metadata)
    write_value_folder(folder, metadata=metadata, tokenizer=tokenizer, params=stored)
    write_card(folder, metadata)


def load_value(
    folder: epath.PathLike,
    *,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    sharding_rules: ShardingRules = DEFAULT_RULES,
    value_model: epath.PathLike | None = None,
    revision: str | None = None,
) -> ValueNetwork:
    """Read a value folder; everything is checked before an array is read.

    The adapter in a LoRA value folder is merged into its model.

    Args:
        folder: the value folder, local, a URL that `etils.epath` reads, or a hub id.
        param_dtype: dtype of every parameter in memory.
        mesh: where the parameters live, sharded by `sharding_rules`, vocabulary rows padded with
            zeros to divide evenly; None: this process's first device, no padding.
        sharding_rules: which mesh axis splits which dimension.
        value_model: folder or hub id of the model that an adapter belongs to; None: the one that
            `ivl.json` names.
        revision: branch, tag or commit of a hub id; `owner/name@revision` is the same.

    Returns:
        The value network.

    Raises:
        FileNotFoundError: it is not a value folder, or an adapter's model cannot be found.
        ValueFolderError: an unknown format version; files that are missing, truncated or altered; a
            tokenizer or an architecture that differs from `ivl.json`; or an adapter's model has
            other weights. Lists all files.
        TreeMismatchError: the arrays do not match the architecture.
        NonFiniteWeightsError: an array has NaN or infinity.
    """
    folder = find_value_folder(folder, revision=revision)
    described = read_description(folder)
    given = () if value_model is None else (value_model,)
    model = find_adapted_model(described[0], folder, given)
    return load_described_value(
        folder,
        *described,
        model_folder=None if model is None else model.folder,
        param_dtype=param_dtype,
        mesh=mesh,
        sharding_rules=sharding_rules,
    )


def load_described_value(
    folder: epath.PathLike,
    metadata: ValueMetadata,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    *,
    model_folder: Path | None,
    param_dtype: DTypeLike,
    mesh: Mesh | None,
    sharding_rules: ShardingRules,
) -> ValueNetwork:
    """Read the arrays of a value folder whose other files have been read and checked.

    Args:
        folder: the value folder.
        metadata: from `read_description`, like the next two.
        tokenizer: its tokenizer.
        info: what identifies the tokenizer.
        model_folder: where the model of an adapter is (`find_adapted_model`), or None.
        param_dtype: as in `load_value`, like the rest.
        mesh: where the parameters live, or None.
        sharding_rules: how they are sharded over the mesh.

    Returns:
        The value network.

    Raises:
        ValueFolderError: it has no arrays.
        TreeMismatchError: the arrays do not match the architecture.
        NonFiniteWeightsError: an array has NaN or infinity.
    """
    folder = absolute_path(folder)
    params = load_network(
        folder,
        metadata,
        model_folder=model_folder,
        param_dtype=param_dtype,
        mesh=mesh,
        sharding_rules=sharding_rules,
    )
    return ValueNetwork(
        arch=value_architecture(metadata, folder),
        params=params,
        connection=metadata.connection,
        metadata=dataclasses.replace(metadata, adapter=None),
        tokenizer=tokenizer,
        tokenizer_info=info,
        chat_template=metadata.chat_template,
        stop_ids=metadata.stop_ids,
        path=str(folder),
    )


def read_description(
    folder: epath.PathLike,
) -> tuple[ValueMetadata, PreTrainedTokenizerBase, TokenizerInfo]:
    """Read and check everything in a value folder except its arrays.

    Args:
        folder: the value folder, or a run's description without arrays.

    Returns:
        Metadata, tokenizer, and what identifies the tokenizer; the hash of every file is checked.

    Raises:
        FileNotFoundError: it is not a value folder.
        ValueFolderError: its files or its tokenizer are not what they should be, or a file was
            added to the tokenizer's.
    """
    folder = absolute_path(folder)
    metadata = read_value_metadata(folder)
    unexpected: list[str] = []
    try:
        manifest = read_manifest(folder)
        problems = file_problems(folder, manifest)
        unexpected = [name for name in unlisted_files(folder, manifest) if name not in UNSEALED]
    except ManifestError as error:
        problems = (str(error),)
    # What lies beside the tokenizer's files may change how it reads a text.
    read = [name for name in unexpected if re.match(rf"{TOKENIZER_FOLDER}/[^.]", name)]
    problems += shorten([f"{name}: not written with the folder" for name in read])
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueFolderError(
            f"{folder} was changed after it was written:{listed}\n"
            "copy the folder again, or export the value network again"
        )
    if unexpected:
        logger.warning(
            "%s holds files that were not written with it and are not read: %s",
            folder,
            ", ".join(shorten(unexpected)),
        )
    recorded = TokenizerInfo.from_json(metadata.tokenizer)
    tokenizer = read_tokenizer(folder / TOKENIZER_FOLDER)
    found = describe_tokenizer(tokenizer)
    _check_tokenizer(found, metadata, value_architecture(metadata, folder), f"{folder}/tokenizer")
    info = dataclasses.replace(found, eos_ids=recorded.eos_ids, pad_id=recorded.pad_id)
    return metadata, tokenizer, info


def check_replaceable(folder: epath.PathLike, *, overwrite: bool) -> None:
    """Check that a value folder may be written here.

    Raises:
        FileExistsError: the folder exists, and it is not a value folder or `overwrite` is not set.
    """
    folder = absolute_path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists: set overwrite, or choose another folder")
    if not (folder / METADATA_NAME).exists() and not is_half_replaced(folder):
        raise FileExistsError(
            f"{folder} exists and has no {METADATA_NAME}: it is not a value folder, so it is not "
            "replaced; choose another folder"
        )


def write_value_folder(
    folder: epath.Path,
    *,
    metadata: ValueMetadata,
    tokenizer: PreTrainedTokenizerBase,
    params: Mapping[str, Any] | None,
) -> None:
    """Write the files to a temporary folder, seal them, and rename it to the final name.

    Args:
        folder: the final folder; an existing one is replaced.
        metadata: content of `ivl.json`.
        tokenizer: its files are copied.
        params: nested string dictionaries of arrays in the stored form; None: no arrays.
    """
    building = building_folder(folder)
    first = jax.process_index() == 0
    if first:
        if building.exists():
            building.rmtree()
        building.mkdir(parents=True)
        write_tokenizer(tokenizer, building / TOKENIZER_FOLDER)
        text = json.dumps(metadata.to_json(), indent=1, ensure_ascii=False) + "\n"
        (building / METADATA_NAME).write_bytes(text.encode())
    _barrier(f"value_folder_begun_{folder}")
    if params is not None:
        with ocp.StandardCheckpointer() as writer:
            writer.save(building / PARAMS_FOLDER, dict(params))
    if first:
        write_manifest(building, {"what": "value folder"}, threads=4)
        finish_replacement(folder)
    _barrier(f"value_folder_finished_{folder}")


def _check_tokenizer(
    found: TokenizerInfo, metadata: ValueMetadata, arch: Architecture, what: str
) -> None:
    recorded = TokenizerInfo.from_json(metadata.tokenizer)
    problems = [
        f"{name}: expected {shortened(getattr(recorded, name), characters=300)}, "
        f"found {shortened(getattr(found, name), characters=300)}"
        for name in ("fingerprint", "vocab_size", "special_tokens", "bos_id")
        if getattr(recorded, name) != getattr(found, name)
    ]
    if found.vocab_size > arch.vocab_size:
        problems.append(
            f"vocab_size: {found.vocab_size} ids, but the architecture has {arch.vocab_size} rows"
        )
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueFolderError(
            f"{what} is not the tokenizer that {METADATA_NAME} describes:{listed}\n"
            "the value network needs the tokenizer it was trained with"
        )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
