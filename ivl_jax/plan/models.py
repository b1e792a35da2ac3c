"""The models of a run from their `config.json` alone: no weights, no tokenizer.

In: a config's model paths. Out: `Models` as training makes them. A path may be a folder that holds
nothing but a `config.json`; for the models in `published.json` a copy of it is bundled; otherwise
the hub is asked for that one file.
"""

from functools import partial
from pathlib import Path
from typing import Any

from etils import epath
from huggingface_hub import hf_hub_download
from jax.sharding import Mesh

from ivl_jax.composed.sources import ModelSource
from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.json_files import read_json_object
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.tokenizer import TokenizerInfo
from ivl_jax.training.models import Models, choose_models
from ivl_jax.weights.language_model import read_arch

_PUBLISHED = Path(__file__).with_name("published.json")


def planned_models(config: TrainConfig, mesh: Mesh) -> Models:
    """Choose the models of a run, as `choose_models` does, without weights or tokenizers.

    Tokenizers are taken to agree; ids beyond the smallest vocabulary count as padding rows.

    Args:
        config: of the run.
        mesh: the device mesh, whose devices need not be attached.

    Returns:
        The models; only their architectures are meaningful.

    Raises:
        ConfigError: a `config.json` cannot be found or read, or as `choose_models`.
    """
    named = [(base.path, base.revision, "base.path") for base in config.all_bases]
    if config.method == "value" and config.value.path:
        named.append((config.value.path, config.value.revision, "value.path"))
    vocab_size = min(read_architecture(*each).vocab_size for each in named)
    return choose_models(config, mesh, read=partial(_source, vocab_size))


def _source(vocab_size: int, path: str, revision: str | None, where: str) -> ModelSource:
    tokenizer: Any = None  # nothing here reads text
    info = TokenizerInfo(vocab_size, "planned", {}, None, (), 0, None)
    arch = read_architecture(path, revision, where)
    return ModelSource(path, path, epath.Path(path), arch, tokenizer, info, ())


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
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{where} = {path}: planning needs its config.json ({reason}): give a folder that "
            f"holds one, as in --{where.removeprefix('--')} FOLDER"
        ) from error
