"""The models of a run from their `config.json` alone: no weights, no tokenizer.

In: a config's model paths. Out: `Models` as training makes them. A path may be a folder that holds
nothing but a `config.json`; for the models in `published.json` a copy of it is bundled; otherwise
the hub is asked for that one file.
"""

import dataclasses
from pathlib import Path
from typing import Any

from etils import epath
from huggingface_hub import hf_hub_download
from jax.sharding import Mesh

from ivl_jax.checkpoint.adapted_model import AdaptedModel
from ivl_jax.checkpoint.value_arrays import value_architecture
from ivl_jax.checkpoint.value_metadata import METADATA_NAME, read_value_metadata
from ivl_jax.composed.compatibility import ComposedSources
from ivl_jax.composed.sources import ModelSource, Schemes, known_scheme
from ivl_jax.composition import SCHEMES, ConnectionScheme
from ivl_jax.config import ConfigError, DistilConfig, TrainConfig, ValueConfig
from ivl_jax.json_files import read_json_object
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.network import Architecture, architecture_from_json
from ivl_jax.paths import usable_path
from ivl_jax.tokenizer import TokenizerInfo
from ivl_jax.training.models import Models, choose_models
from ivl_jax.weights.language_model import read_arch

_PUBLISHED = Path(__file__).with_name("published.json")


def planned_models(config: TrainConfig, mesh: Mesh, *, memory: int) -> Models:
    """Choose the models of a run, as `choose_models` does, without weights or tokenizers.

    Tokenizers are taken to agree; ids beyond the smallest vocabulary count as padding rows.

    Args:
        config: of the run.
        mesh: the device mesh, whose devices need not be attached.
        memory: bytes that each of its devices has.

    Returns:
        The models; only their architectures are meaningful.

    Raises:
        ConfigError: a `config.json` cannot be found or read, or as `choose_models`.
    """
    named = [(base.path, base.revision, "base.path") for base in config.all_bases]
    adapter, adapted = None, None
    if config.method == "value" and config.value.path:
        if (usable_path(config.value.path) / METADATA_NAME).exists():
            adapter = read_value_metadata(config.value.path)
            adapted = value_architecture(adapter, config.value.path)
        else:
            named.append((config.value.path, config.value.revision, "value.path"))
    if config.distil.teacher:
        named.append((config.distil.teacher, config.distil.revision, "distil.teacher"))
    sizes = [read_architecture(*each).vocab_size for each in named]
    if adapted is not None:
        sizes.append(adapted.vocab_size)
    vocab_size = min(sizes)

    def read(path: str, revision: str | None, where: str) -> ModelSource:
        if where == "value.lora.model" and adapted is not None:
            # The value folder describes the model of its adapter, which need not be at hand.
            return _source(path, adapted, vocab_size)
        return _source(path, read_architecture(path, revision, where), vocab_size)

    def adapt(value: ValueConfig, scheme: ConnectionScheme) -> ModelSource:
        assert adapter is not None
        assert adapted is not None
        found = _source(value.path, adapted, vocab_size, scheme)
        model = None
        if adapter.adapter is not None:
            name = adapter.adapter["model"]["name"]
            model = AdaptedModel(name, None, Path(name))
        return dataclasses.replace(found, metadata=adapter, adapted=model)

    def teach(options: DistilConfig, students: Any) -> ComposedSources:
        del students
        values = tuple(
            _source(path, arch, vocab_size, scheme)
            for path in options.values
            for arch, scheme in [read_value_architecture(path, where="distil.values", schemes={})]
        )
        base = read(options.teacher, options.revision, "distil.teacher")
        return ComposedSources(base, values, None, unknown_ids=((),) * len(values))

    return choose_models(config, mesh, read=read, teach=teach, adapt=adapt, memory=memory)


def _source(
    path: str, arch: Architecture, vocab_size: int, scheme: ConnectionScheme = SCHEMES["residual"]
) -> ModelSource:
    tokenizer: Any = None  # nothing here reads text
    info = TokenizerInfo(vocab_size, "planned", {}, None, (), 0, None)
    return ModelSource(path, path, epath.Path(path), arch, tokenizer, info, (), scheme=scheme)


def read_value_architecture(
    path: str, *, where: str, schemes: Schemes
) -> tuple[Architecture, ConnectionScheme]:
    """Read a value folder's architecture and connection scheme.

    Args:
        path: a value folder; or a language model in its place, which is residual.
        where: the config key or flag, for errors.
        schemes: connection schemes of the user's own, by name.

    Returns:
        Both.

    Raises:
        ConfigError: its `config.json` cannot be found or read.
        ValueError: the value folder's description is damaged, or its scheme is unknown.
    """
    if not (epath.Path(path) / METADATA_NAME).exists():
        return read_architecture(path, None, where), SCHEMES["residual"]
    metadata = read_value_metadata(path)
    arch = architecture_from_json(metadata.architecture)
    return arch, known_scheme(metadata.connection, schemes, path)


def read_architecture(path: str, revision: str | None, where: str) -> ArchConfig:
    """Read a language model's architecture.

    Args:
        path: a folder with a `config.json`, or a hub id.
        revision: hub revision, or None.
        where: the config key, for errors.

    Returns:
        The architecture.

    Raises:
        ConfigError: its `config.json` cannot be found or read.
    """
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return read_arch(folder)
        published = read_json_object(_PUBLISHED)
        if revision is None and path in published:
            return ArchConfig.from_hf(published[path])
        return read_arch(Path(hf_hub_download(path, "config.json", revision=revision)).parent)
    except (ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        if (Path(path).expanduser() / "config.json").is_file():
            raise ConfigError(f"{where}: {' '.join(lines)}") from error
        reason = lines[0]
        raise ConfigError(
            f"{where} = {path}: planning needs its config.json ({reason}): give a folder that "
            "holds one"
        ) from error
