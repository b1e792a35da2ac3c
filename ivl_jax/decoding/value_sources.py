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
from ivl_jax.checkpoint.value_folder import load_value_tokenizer
from ivl_jax.checkpoint.value_metadata import METADATA_NAME
from ivl_jax.composed.compatibility import Side, check_draft_fit, check_fit
from ivl_jax.composed.kernel_form import lay_out_network, loading_form
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.decoding.prompts import PromptReader, TextSide, make_prompt_reader
from ivl_jax.model.network import architecture_from_json
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
    def scheme(self) -> ConnectionScheme:
        """The connection scheme; a language model reads text only."""
        return SCHEMES["residual" if self.metadata is None else self.metadata.connection]


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


def read_base(name: str, folder: Path, *, role: str = "the base") -> TextSide:
    """Read the text side of a language model's folder.

    Args:
        name: as the user named it.
        folder: where it is.
        role: what messages call it before its name.

    Returns:
        The text side.

    Raises:
        FileNotFoundError: the folder lacks its `config.json`.
        ValueError: its architecture or its tokenizer cannot be used.
    """
    context = read_arch(folder).max_position_embeddings
    tokenizer = load_tokenizer(folder)
    info = describe_tokenizer(tokenizer, folder)
    side = Side(f"{role} {name}".strip(), name, info)
    return TextSide(side, lambda: tokenizer, "auto", info.eos_ids, context)


def check_sources(
    base: TextSide, sources: Sequence[ValueSource], *, draft: TextSide | None = None
) -> PromptReader:
    """Check tokenizers and schemes against each other; no weights are read.

    Args:
        base: of `read_base`.
        sources: the value networks.
        draft: of `read_base`, a base that is to propose tokens; or None.

    Returns:
        How prompts become tokens for them.

    Raises:
        ValueError: as `ivl_jax.composed.compatibility.check_fit` and `check_draft_fit`.
    """
    values = [_read_value(source, base.side.info) for source in sources]
    maps = [source.described_map for source in sources]
    schemes = [source.scheme for source in sources]
    for value, scheme, one_map in zip(values, schemes, maps, strict=True):
        check_fit(base.side, value.side, scheme=scheme, described_map=one_map)
    if draft is not None:
        names = [source.path for source in sources]
        facts = list(zip(names, schemes, maps, strict=True))
        check_draft_fit(base.side, draft.side, facts)
    return make_prompt_reader(base, values, maps, draft=draft)


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
        return load_language_model(
            source.path,
            param_dtype=dtype,
            form=loading_form(mesh),
            mesh=mesh,
            sharding_rules=rules,
        )
    value = load_value(source.folder, param_dtype=dtype, mesh=mesh, sharding_rules=rules)
    if mesh is not None:
        return value
    # Here, so that only one value network at a time is held in both forms.
    _, params = lay_out_network(value.params, value.arch, None)
    return dataclasses.replace(value, params=params)


def _read_value(source: ValueSource, base: TokenizerInfo) -> TextSide:
    """A value network's text side; its tokenizer is read only where that can matter."""
    if source.metadata is None:
        return read_base(source.path, Path(source.folder), role="")
    recorded = TokenizerInfo.from_json(source.metadata.tokenizer)
    if recorded.fingerprint == base.fingerprint:
        # The same ordinary tokens, by definition; what the two may differ in is on record.
        size = recorded.vocab_size
        ordinary = (*base.ordinary_tokens[:size], *[None] * (size - base.vocab_size))
        info = dataclasses.replace(recorded, ordinary_tokens=ordinary)
    else:
        info = describe_tokenizer(load_value_tokenizer(source.folder))
    return TextSide(
        Side(source.path, source.path, info),
        lambda: load_value_tokenizer(source.folder),
        source.metadata.chat_template,
        source.metadata.stop_ids,
        architecture_from_json(source.metadata.architecture).max_position_embeddings,
    )
