"""A model before its weights: everything about it that is cheap to read and check.

In: a language model's folder or hub id, or a value folder. Out: `ModelSource`, whose `load` reads
the weights. Training, decoding and evaluation all start from these; nothing is read twice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ivl_jax.checkpoint import ValueMetadata, ValueNetwork
from ivl_jax.checkpoint.adapted_model import AdaptedModel, find_adapted_model
from ivl_jax.checkpoint.hub import value_on_hub
from ivl_jax.checkpoint.value_arrays import value_architecture
from ivl_jax.checkpoint.value_folder import load_described_value, read_description
from ivl_jax.checkpoint.value_metadata import METADATA_NAME
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.extensions import load_extension
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.network import Architecture
from ivl_jax.model.projection import AS_TRAINED, KernelForm
from ivl_jax.paths import usable_path
from ivl_jax.sharding import DEFAULT_RULES, ShardingRules
from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer, load_tokenizer
from ivl_jax.vocabulary.mapping import DescribedMap, read_map
from ivl_jax.weights.language_model import (
    LanguageModel,
    find_model,
    load_described_model,
    read_arch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

Schemes = Mapping[str, ConnectionScheme]
"""The user's own connection schemes, by the name that a value folder has for them."""
NO_SCHEMES: Schemes = {}


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A language model or a value network before its weights are read.

    Attributes:
        label: What messages call it.
        path: As the user wrote it; empty for a model made in memory.
        folder: Where it is.
        arch: Its architecture.
        tokenizer: Its tokenizer.
        info: What identifies the tokenizer.
        stop_ids: Its own ids that end a text.
        chat_template: A named format, `auto` or a template's text.
        scheme: How a value network is connected to a base; a language model used as a value
            network reads only the text.
        metadata: Of a value folder; None for a language model.
        adapted: The model that a LoRA value folder's adapter belongs to; None without an adapter.
        described_map: The vocabulary map that it needs on the base, or None.
    """

    label: str
    path: str
    folder: epath.Path = field(repr=False)
    arch: Architecture = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    info: TokenizerInfo = field(repr=False)
    stop_ids: tuple[int, ...] = field(repr=False)
    chat_template: str = field(repr=False, default="auto")
    scheme: ConnectionScheme = SCHEMES["residual"]
    metadata: ValueMetadata | None = field(repr=False, default=None)
    adapted: AdaptedModel | None = field(repr=False, default=None)
    described_map: DescribedMap | None = field(repr=False, default=None)

    @property
    def context(self) -> int:
        """The most tokens it can read."""
        return self.arch.max_position_embeddings

    @property
    def decoder(self) -> ArchConfig:
        """The architecture of a model with layers, which every language model has."""
        assert isinstance(self.arch, ArchConfig), f"{self.label} is a linear map"
        return self.arch

    @property
    def local_folder(self) -> Path:
        """The folder of a language model, which is always local."""
        return Path(self.folder)

    def load(
        self,
        *,
        param_dtype: DTypeLike,
        form: KernelForm = AS_TRAINED,
        mesh: Mesh | None = None,
        sharding_rules: ShardingRules = DEFAULT_RULES,
    ) -> LanguageModel | ValueNetwork:
        """Read the weights.

        Args:
            param_dtype: float32, bfloat16 or float16, for every parameter that is not in int8.
            form: how a language model's kernels are stored; a value network's are as trained.
            mesh: where the parameters live, or None.
            sharding_rules: how they are sharded over the mesh.

        Returns:
            The loaded model.

        Raises:
            ValueError: the weights do not match the architecture.
        """
        where: dict[str, Any] = {"mesh": mesh, "sharding_rules": sharding_rules}
        if self.metadata is not None:
            described = (self.metadata, self.tokenizer, self.info)
            return load_described_value(
                self.folder,
                *described,
                model_folder=None if self.adapted is None else self.adapted.folder,
                param_dtype=param_dtype,
                **where,
            )
        return load_described_model(
            self.path,
            self.local_folder,
            self.decoder,
            self.tokenizer,
            self.info,
            param_dtype=param_dtype,
            form=form,
            **where,
        )


def read_language_model(
    path: str | Path, *, revision: str | None = None, role: str = ""
) -> ModelSource:
    """Read everything but the weights of a language model.

    Args:
        path: a folder, or a hub id.
        revision: branch, tag or commit on the hub.
        role: the word that precedes its path in messages.

    Returns:
        The source.

    Raises:
        FileNotFoundError: there is no such folder or hub id, or it has no `config.json`.
        ValueError: its architecture or its tokenizer is not supported.
    """
    folder = find_model(path, revision=revision)
    arch = read_arch(folder)
    tokenizer = load_tokenizer(folder)
    info = describe_tokenizer(tokenizer, folder)
    return ModelSource(
        label=f"{role} {path}".strip(),
        path=str(path),
        folder=epath.Path(folder),
        arch=arch,
        tokenizer=tokenizer,
        info=info,
        stop_ids=info.eos_ids,
    )


def read_value(
    path: str, *, schemes: Schemes = NO_SCHEMES, models: Sequence[str] = ()
) -> ModelSource:
    """Read everything but the weights of a value network, or of a language model used as one.

    Args:
        path: a value folder, local, a URL that `etils.epath` reads, or a hub id (`owner/name` or
            `owner/name@revision`); or the folder or hub id of a language model.
        schemes: connection schemes beyond the package's own that a value folder may name, by the
            name used there (`module:attribute`).
        models: folders or hub ids, of which one is the model of a LoRA value folder's adapter;
            empty: where the folder says.

    Returns:
        The source; the hash of every file of a value folder has been checked.

    Raises:
        FileNotFoundError: it is neither, or an adapter's model cannot be found.
        ValueError: its files are damaged or invalid, its connection scheme is unknown, or an
            adapter's model has other weights than in training.
    """
    try:
        folder = value_on_hub(path) or usable_path(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--value {path}: neither a value folder nor a language model: {error}"
        ) from error
    if (folder / METADATA_NAME).exists():
        metadata, tokenizer, info = read_description(folder)
        return ModelSource(
            label=path,
            path=path,
            folder=folder,
            arch=value_architecture(metadata, folder),
            tokenizer=tokenizer,
            info=info,
            stop_ids=metadata.stop_ids,
            chat_template=metadata.chat_template,
            scheme=known_scheme(metadata.connection, schemes, path),
            metadata=metadata,
            adapted=find_adapted_model(metadata, path, models),
        )
    if folder.is_dir() and not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"--value {path}: the folder has neither {METADATA_NAME} (a value folder, which "
            "train.py writes to RUN_DIR/value) nor config.json (a language model)"
        )
    try:
        return read_language_model(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--value {path}: neither a value folder nor a language model: {error}"
        ) from error


def read_values(
    paths: Sequence[str],
    maps: Sequence[str],
    *,
    schemes: Schemes = NO_SCHEMES,
    models: Sequence[str] = (),
) -> list[ModelSource]:
    """Read everything but the weights of value networks, and their vocabulary maps.

    Args:
        paths: as in `read_value`; `none` is left out.
        maps: for each of them a map's file, or `none`; empty: no maps at all.
        schemes: as in `read_value`.
        models: as in `read_value`, for all of them.

    Returns:
        One source each, in order.

    Raises:
        FileNotFoundError: as `read_value`.
        ValueError: as `read_value`; or a map cannot be read.
    """
    sources = [read_value(path, schemes=schemes, models=models) for path in paths if path != "none"]
    if not sources or not maps:
        return sources
    return [
        source if file == "none" else dataclasses.replace(source, described_map=read_map(file))
        for source, file in zip(sources, maps, strict=True)
    ]


def load_schemes(names: Sequence[str]) -> Schemes:
    """Import connection schemes that the user names.

    Args:
        names: each `module:attribute`, as value folders have them.

    Returns:
        Name → scheme.

    Raises:
        ValueError: no such module or attribute, or one that is not a connection scheme.
    """
    return {
        name: load_extension(name, SCHEMES, ConnectionScheme, where="--connection")
        for name in names
    }


def source_of(
    model: LanguageModel | ValueNetwork,
    label: str,
    *,
    described_map: DescribedMap | None = None,
    schemes: Schemes = NO_SCHEMES,
) -> ModelSource:
    """The source of a model that is already loaded.

    Args:
        model: the model.
        label: what messages call it.
        described_map: the vocabulary map that it needs on the base, or None.
        schemes: as in `read_value`.

    Returns:
        The source, without the model's arrays.

    Raises:
        ValueError: its connection scheme is unknown.
    """
    value = model if isinstance(model, ValueNetwork) else None
    return ModelSource(
        label=label,
        path=model.path,
        folder=epath.Path(model.path),
        arch=model.arch,
        tokenizer=model.tokenizer,
        info=model.tokenizer_info,
        stop_ids=model.stop_ids,
        chat_template="auto" if value is None else value.chat_template,
        scheme=known_scheme("residual" if value is None else value.connection, schemes, label),
        metadata=None if value is None else value.metadata,
        described_map=described_map,
    )


def known_scheme(name: str, schemes: Schemes, label: str) -> ConnectionScheme:
    """The connection scheme that a value folder names; never imports anything.

    Args:
        name: as written in the folder.
        schemes: as in `read_value`.
        label: what messages call the value network.

    Returns:
        The scheme.

    Raises:
        ValueError: it is neither one of the package's schemes nor in `schemes`.
    """
    found = SCHEMES.get(name) or schemes.get(name)
    if found is None:
        raise ValueError(
            f"{label}: its connection scheme {name} is not part of ivl_jax ({', '.join(SCHEMES)}), "
            "and a value folder never causes an import: if you trust it, pass "
            f"--connection {name} (from Python: schemes={{{name!r}: …}})"
        )
    return found
