"""Language models by folder or hub id: weights together with tokenizer and stop ids.

In: a local folder or a hub id. Out: `LanguageModel`: architecture, parameters, tokenizer, the ids
that end a text; or a Hugging Face folder made from one.
"""

import functools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from ivl_jax.json_files import read_json_object
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, abstract_params
from ivl_jax.model.projection import AS_TRAINED, KernelForm
from ivl_jax.paths import is_local
from ivl_jax.sharding import (
    DEFAULT_RULES,
    ShardingRules,
    padded_vocab_rows,
    parameter_shardings,
)
from ivl_jax.tokenizer import TokenizerInfo, describe_tokenizer, load_tokenizer, save_tokenizer
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_folder import find_tensors, new_folder
from ivl_jax.weights.hf_names import stored_layers
from ivl_jax.weights.hf_saving import write_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any  # importing transformers takes a second

logger = logging.getLogger(__name__)

_VALUE_METADATA = "ivl.json"  # marks a value folder
# Weights under transformers' names, the configuration, and every file a tokenizer may need. Not
# *.bin, and not a second copy of the weights in another format (Mistral's
# consolidated.safetensors).
_WANTED = ["model*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class LanguageModel:
    """A pre-trained model with its tokenizer.

    Attributes:
        path: the folder or hub id it came from.
        arch: the architecture.
        params: parameters, layers unstacked; vocabulary rows may be padded.
        tokenizer: from the same folder.
        tokenizer_info: what identifies the tokenizer.
        stop_ids: every id that ends a text, including those of `generation_config.json`.
    """

    path: str
    arch: ArchConfig
    params: Params = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    tokenizer_info: TokenizerInfo = field(repr=False)
    stop_ids: tuple[int, ...]


def load_language_model(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    param_dtype: DTypeLike = jnp.float32,
    form: KernelForm = AS_TRAINED,
    mesh: Mesh | None = None,
    sharding_rules: ShardingRules = DEFAULT_RULES,
) -> LanguageModel:
    """Load a model from a local folder, or else from the Hugging Face hub.

    Args:
        path_or_hub_id: a folder (tried first), or an id such as `TinyLlama/TinyLlama_v1.1`.
        revision: branch, tag or commit on the hub; None: its main branch, or a local folder.
        param_dtype: float32, bfloat16 or float16, of every parameter that is not in int8.
        form: how kernels are stored; for a model that only decodes, the result of
            `ivl_jax.composed.kernel_form.loading_form`.
        mesh: where the parameters live, sharded by `sharding_rules`, vocabulary rows padded to
            divide evenly; None: the default device, no padding.
        sharding_rules: which mesh axis splits which dimension.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such folder or hub id, or one of its files is missing.
        ValueError: the architecture, the tokenizer or a tensor is invalid or not supported.
    """
    folder = find_model(path_or_hub_id, revision=revision)
    arch = read_arch(folder)
    tokenizer = load_tokenizer(folder)
    info = describe_tokenizer(tokenizer, folder)
    check_rows(str(folder), info, arch)
    return load_described_model(
        str(path_or_hub_id),
        folder,
        arch,
        tokenizer,
        info,
        param_dtype=param_dtype,
        form=form,
        mesh=mesh,
        sharding_rules=sharding_rules,
    )


def check_rows(name: str, info: TokenizerInfo, arch: ArchConfig) -> None:
    """Check that a model's embedding has a row for each token.

    Raises:
        ValueError: the tokenizer has more ids.
    """
    if info.vocab_size > arch.vocab_size:
        raise ValueError(
            f"{name}: expected a tokenizer of at most {arch.vocab_size} ids (vocab_size in "
            f"config.json), got {info.vocab_size}: tokenizer and weights belong to different models"
        )


def load_described_model(
    path: str,
    folder: Path,
    arch: ArchConfig,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    *,
    param_dtype: DTypeLike,
    form: KernelForm,
    mesh: Mesh | None,
    sharding_rules: ShardingRules,
) -> LanguageModel:
    """Read the weights of a model whose other files have been read and checked.

    Args:
        path: as the user wrote it.
        folder: where it is.
        arch: its architecture.
        tokenizer: its tokenizer.
        info: what identifies the tokenizer.
        param_dtype: as in `load_language_model`, like the rest.
        form: how kernels are stored.
        mesh: where the parameters live, or None.
        sharding_rules: how they are sharded over the mesh.

    Returns:
        The model.

    Raises:
        FileNotFoundError: one of its files is missing.
        ValueError: a tensor is invalid or not supported.
    """
    vocab_rows, shardings = None, None
    if mesh is not None:
        vocab_rows = padded_vocab_rows(arch.vocab_size, mesh, sharding_rules)
        shardings = parameter_shardings(
            abstract_params(arch, vocab_rows=vocab_rows, form=form),
            mesh,
            sharding_rules,
            units={"heads": arch.num_attention_heads, "kv_heads": arch.num_key_value_heads},
        )
    params = load_params(
        folder,
        arch,
        param_dtype=param_dtype,
        form=form,
        vocab_rows=vocab_rows,
        shardings=shardings,
    )
    return LanguageModel(
        path=path,
        arch=arch,
        params=params,
        tokenizer=tokenizer,
        tokenizer_info=info,
        stop_ids=info.eos_ids,
    )


def find_model(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model; downloads it if there is no folder of that name.

    Args:
        path_or_hub_id: a folder, or a hub id `owner/name`.
        revision: branch, tag or commit on the hub.

    Returns:
        A local folder.

    Raises:
        FileNotFoundError: there is no such folder, and the hub cannot be reached or has no such
            model.
        TypeError: something else than a path was given.
        ValueError: a revision was given with a local folder, or the folder is a value folder.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise TypeError(f"expected a model's folder or hub id, got {path_or_hub_id!r:.60}")
    name = os.fspath(path_or_hub_id)
    if not is_local(name):
        raise FileNotFoundError(
            f"{name}: a language model is read from a local folder or the hub, since its weights "
            f"are mapped into memory: copy it first (gcloud storage cp --recursive {name} FOLDER)"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_is_language_model(folder, name)
        if revision is not None:
            raise ValueError(
                f"{name}: revision {revision!r} applies to the hub, but a local folder has this "
                "name"
            )
        return folder
    if isinstance(path_or_hub_id, Path) or folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"{name}: no such folder")
    return download_snapshot(name, revision=revision, wanted=_WANTED, unwanted="*/*")


def download_snapshot(
    name: str, *, revision: str | None, wanted: list[str], unwanted: str | None = None
) -> Path:
    """Download files of a repository on the hub into the hub's cache, those not there yet.

    Args:
        name: the hub id, `owner/name`.
        revision: branch, tag or commit; None: the main branch.
        wanted: patterns of the files' names.
        unwanted: a pattern of files that are left out, or None.

    Returns:
        The folder in the cache; without files if none matches.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has no such repository or revision.
    """
    missing = f"{name}: no such folder here ({Path.cwd()}), and "
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{missing}the hub requires its licence to be accepted: do that on the model's page, "
            "then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{missing}the hub has no revision {revision!r} of it") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{missing}it is not a hub id (owner/name)") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{missing}the hub has no model of this name, or it is private: check the spelling, or "
            "run `hf auth login`"
        ) from error
    except OSError as error:  # offline, or no connection, and not in the cache
        raise FileNotFoundError(
            f"{missing}it is not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}): download it with network access "
            f"(`hf download {name}`) and pass the folder"
        ) from error


def _check_is_language_model(folder: Path, name: str) -> None:
    """Say what a folder of this package is, and how it is used, where it is not a model."""
    if (folder / "config.json").exists():
        return
    value = "load it with ivl_jax.load_value and put it on a base: ivl_jax.compose, or --value"
    if (folder / _VALUE_METADATA).exists():
        raise ValueError(f"{name} is a value folder, not a language model: {value}")
    if (folder / "value" / _VALUE_METADATA).exists():
        raise ValueError(
            f"{name} is the directory of a training run, not a language model: its value folder "
            f"is {name}/value; {value}"
        )


def read_arch(folder: Path) -> ArchConfig:
    """Read the architecture from a folder's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object, describes a model that is not supported, or has another
            number of layers than the weights beside it; names the file and the field.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: expected a config.json; check that this is the folder of a model"
        )
    config = read_json_object(path)
    try:
        arch = ArchConfig.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_layers(folder, arch)
    if config.get("auto_map"):
        _say_that_code_stays_unused(path)
    return arch


def _check_layers(folder: Path, arch: ArchConfig) -> None:
    """Compare the layers with the headers of the weights: building many layers takes minutes."""
    try:
        stored = stored_layers(find_tensors(folder))
    except FileNotFoundError:
        return  # explained when the weights are read, which may happen elsewhere
    if stored and stored != arch.num_hidden_layers:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers: expected {stored}, the layers in the "
            f"safetensors files beside it, got {arch.num_hidden_layers}; check that both belong to "
            "the same model"
        )


@functools.cache
def _say_that_code_stays_unused(path: Path) -> None:
    """Warn once per folder, from which models may be read several times."""
    logger.warning(
        "%s: auto_map names Python code in the folder, which is not run: the config describes a "
        "supported family, so ivl_jax's own decoder computes the model",
        path,
    )


def save_language_model(
    folder: Path | str,
    model: LanguageModel,
    *,
    dtype: DTypeLike,
    chat_template: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face folder: weights, configuration, tokenizer, stop ids.

    The folder appears once it is complete.

    Args:
        folder: the folder to create.
        model: the model.
        dtype: float32 or bfloat16, of every tensor written.
        chat_template: Jinja text for the tokenizer; None keeps its own.
        overwrite: replace an existing model folder.

    Raises:
        FileExistsError: the folder exists, has files, and may not be replaced.
        TreeMismatchError: the parameters do not match the architecture.
    """
    with new_folder(Path(folder), overwrite=overwrite) as staging:
        write_params(staging, model.arch, model.params, dtype=dtype)
        if jax.process_index() == 0:
            _save_tokenizer(model.tokenizer, staging, chat_template)
            text = json.dumps(_generation_config(model), indent=2)
            (staging / "generation_config.json").write_text(text + "\n")


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None
) -> None:
    own_template = tokenizer.chat_template
    try:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        save_tokenizer(tokenizer, folder)
    finally:
        tokenizer.chat_template = own_template


def _generation_config(model: LanguageModel) -> Mapping[str, Any]:
    """What transformers' `generate` needs to stop where this model stops."""
    ids = {
        "bos_token_id": model.tokenizer_info.bos_id,
        "eos_token_id": list(model.stop_ids),
        "pad_token_id": model.tokenizer_info.pad_id,
    }
    return {name: value for name, value in ids.items() if value not in (None, [])}
