"""What each `--value` of infer.py names, checked against the base before any weight is read.

In: paths of value folders, language models and vocabulary maps, the base's folder. Out:
`ValueSource`s whose tokenizers, maps and schemes fit the base; then the loaded networks.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ivl_jax.checkpoint import ValueMetadata, ValueNetwork, load_value, read_value_metadata
from ivl_jax.checkpoint.value_folder import TOKENIZER_FOLDER
from ivl_jax.checkpoint.value_metadata import METADATA_NAME
from ivl_jax.decoding.compatibility import Side, check_draft_fit, check_fit
from ivl_jax.sharding import ShardingRules
from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer, load_tokenizer
from ivl_jax.vocabulary.mapping import DescribedMap, read_map
from ivl_jax.weights.language_model import (
    LanguageModel,
    find_model,
    load_language_model,
    read_arch,
)


@dataclass(frozen=True)
class ValueSource:
    """Where a value network comes from.

    Attributes:
        path: As the user named it.
        folder: The folder it is in.
        metadata: Of a value folder; None for a language model.
        described_map: The vocabulary map it needs on this base, or None.
    """

    path: str
    folder: epath.PathLike
    metadata: ValueMetadata | None
    described_map: DescribedMap | None = None

    @property
    def connection(self) -> str:
        """The connection scheme; a language model reads text only."""
        return "residual" if self.metadata is None else self.metadata.connection


def find_values(paths: Sequence[str], maps: Sequence[str]) -> list[ValueSource]:
    """Find value networks and read their vocabulary maps.

    Args:
        paths: value folders or language models, as `find_value` takes them; `none` is left out.
        maps: for each of them a map's file, or `none`; empty: none at all.

    Returns:
        One source each, in order.

    Raises:
        FileNotFoundError: as `find_value`.
        ValueError: as `find_value`, or a map that cannot be read.
    """
    sources = [find_value(path) for path in paths if path != "none"]
    if not sources or not maps:
        return sources
    return [
        source if file == "none" else dataclasses.replace(source, described_map=read_map(file))
        for source, file in zip(sources, maps, strict=True)
    ]


def find_value(path: str) -> ValueSource:
    """Find out whether a path is a value folder or a language model.

    Args:
        path: a value folder, local or a URL that `etils.epath` reads; or a Hugging Face folder or
            hub id.

    Returns:
        The source; of a value folder, with what its `ivl.json` says.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: its `ivl.json` or `config.json` cannot be used.
    """
    folder = epath.Path(path)
    if (folder / METADATA_NAME).exists():
        return ValueSource(path, folder, read_value_metadata(folder))
    if folder.is_dir() and not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"--value {path}: the folder has neither {METADATA_NAME} (a value folder, as train.py "
            "writes one to RUN_DIR/value) nor config.json (a language model)"
        )
    try:
        found = find_model(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--value {path}: neither a value folder nor a language model: {error}"
        ) from error
    read_arch(found)
    return ValueSource(path, found, None)


def check_sources(base_name: str, base_folder: Path, sources: Sequence[ValueSource]) -> None:
    """Check tokenizers and schemes against the base; no weights are read.

    Args:
        base_name: the base, as the user named it.
        base_folder: where it is.
        sources: the value networks.

    Raises:
        ValueError: as `ivl_jax.decoding.compatibility.check_fit`.
    """
    if not sources:
        return
    base_info = describe_tokenizer(load_tokenizer(base_folder), base_folder)
    base = Side(f"the base {base_name}", base_name, base_info)
    for source in sources:
        info = _tokenizer_info(source, base_info)
        check_fit(
            base,
            Side(source.path, source.path, info),
            connection=source.connection,
            described_map=source.described_map,
        )


def check_draft(
    base_name: str,
    base_folder: Path,
    draft_name: str,
    draft_folder: Path,
    sources: Sequence[ValueSource],
) -> None:
    """Check that a draft can propose tokens for the base; no weights are read.

    Args:
        base_name: the base, as the user named it.
        base_folder: where it is.
        draft_name: the draft, as the user named it.
        draft_folder: where it is.
        sources: the value networks.

    Raises:
        ValueError: as `ivl_jax.decoding.compatibility.check_draft_fit`.
    """
    read_arch(draft_folder)
    base, draft = (
        Side(f"{role} {name}", name, describe_tokenizer(load_tokenizer(folder), folder))
        for role, name, folder in (
            ("the base", base_name, base_folder),
            ("the draft", draft_name, draft_folder),
        )
    )
    values = [(source.path, source.connection, source.described_map) for source in sources]
    check_draft_fit(base, draft, values)


def load_source(
    source: ValueSource, *, dtype: DTypeLike, mesh: Mesh | None, rules: ShardingRules
) -> ValueNetwork | LanguageModel:
    """Load the weights.

    Args:
        source: of `find_value`.
        dtype: of every parameter.
        mesh: where the parameters live, or None.
        rules: their layout on the mesh.

    Returns:
        The value network, or the language model in its place.
    """
    if source.metadata is None:
        return load_language_model(source.path, param_dtype=dtype, mesh=mesh, sharding_rules=rules)
    return load_value(source.folder, param_dtype=dtype, mesh=mesh, sharding_rules=rules)


def _tokenizer_info(source: ValueSource, base: TokenizerInfo) -> TokenizerInfo:
    """What identifies the value's tokenizer; its files are read only where that can matter."""
    if source.metadata is None:
        return describe_tokenizer(load_tokenizer(source.folder), source.folder)
    recorded = TokenizerInfo.from_json(source.metadata.tokenizer)
    if recorded.fingerprint == base.fingerprint:
        # The same ordinary tokens, by definition; what the two may differ in is on record.
        size = recorded.vocab_size
        ordinary = (*base.ordinary_tokens[:size], *[None] * (size - base.vocab_size))
        return dataclasses.replace(recorded, ordinary_tokens=ordinary)
    return describe_tokenizer(load_tokenizer(epath.Path(source.folder) / TOKENIZER_FOLDER))
