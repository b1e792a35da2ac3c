"""The output of a finished run: the value folder, or the fine-tuned model's folder.

In: the state after the last step, models and data of the run. Out: a self-contained folder.
"""

import hashlib
import logging
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from ivl_jax.checkpoint import ValueMetadata, save_value
from ivl_jax.checkpoint.value_card import read_training_facts, write_card
from ivl_jax.config import TrainConfig
from ivl_jax.data.templates import standalone_template
from ivl_jax.folder_copies import copy_files, file_names
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import unstack_layers
from ivl_jax.model.network import architecture_to_json
from ivl_jax.paths import is_local
from ivl_jax.training.models import Models
from ivl_jax.training.objectives.objective import Objective
from ivl_jax.training.run_directory import RunDirectory
from ivl_jax.training.setup import Preparation
from ivl_jax.training.step import TrainState
from ivl_jax.training.used_weights import UsedWeights
from ivl_jax.weights.fingerprint import combined_fingerprint
from ivl_jax.weights.language_model import LanguageModel, save_language_model

logger = logging.getLogger(__name__)


def value_metadata(
    config: TrainConfig, prepared: Preparation, weights: UsedWeights, *, steps: int
) -> ValueMetadata:
    """Describe the value network of a run for its value folder.

    Args:
        config: of the run.
        prepared: its models and data.
        weights: fingerprints of the weights it reads.
        steps: optimizer steps taken.

    Returns:
        The content of `ivl.json`.
    """
    models, chat_format = prepared.models, prepared.data.chat_format
    bases = [base.model for base in models.bases]
    info = models.trained.info
    return ValueMetadata(
        architecture=architecture_to_json(models.arch),
        connection=config.value.connection,
        penalty={
            "kind": config.penalty.kind,
            "weight": config.penalty.weight,
            "positions": config.penalty.positions,
        },
        tokenizer=info.to_json(),
        training_base={
            "name": " and ".join(base.path for base in bases),
            "fingerprint": combined_fingerprint(weights.bases),
        },
        chat_template=chat_format.template,
        stop_ids=stop_ids(prepared),
        steps=steps,
        adapter=_adapter_record(config, models, weights),
    )


def _adapter_record(
    config: TrainConfig, models: Models, weights: UsedWeights
) -> dict[str, Any] | None:
    """What a value folder says of its adapter; None: it holds the whole network."""
    lora = models.lora
    if lora is None:
        return None
    records, path = weights.records, models.trained.path
    frozen = records.get("value.lora.model") or records["value.path"]
    revision = config.value.revision
    if models.adapter is not None and models.adapter.adapted is not None:
        revision = models.adapter.adapted.revision
    is_folder = Path(path).expanduser().is_dir()
    model = {
        # From anywhere on this machine; elsewhere, the reader says where it is.
        "name": str(Path(path).expanduser().absolute()) if is_folder else path,
        "revision": revision,
        "fingerprint": frozen["fingerprint"],
    }
    return {**asdict(lora), "model": model}


def save_output(
    config: TrainConfig,
    directory: RunDirectory,
    prepared: Preparation,
    weights: UsedWeights,
    state: TrainState,
) -> epath.Path:
    """Write the final value folder, or the fine-tuned model's.

    Args:
        config: of the run.
        directory: its run directory.
        prepared: its models and data.
        weights: fingerprints of the weights it reads.
        state: after the last step.

    Returns:
        The folder.
    """
    models = prepared.models
    if config.method == "value":
        steps = int(state.step)
        metadata = value_metadata(config, prepared, weights, steps=steps)
        save_value(
            directory.value,
            params=state.params,
            metadata=metadata,
            tokenizer=models.trained.tokenizer,
            overwrite=True,
        )
        write_card(directory.value, metadata, read_training_facts(directory.path, steps))
        logger.info("value folder: %s", directory.value)
        return directory.value
    assert isinstance(models.arch, ArchConfig)
    params = unstack_layers(state.params) if config.step.scan_layers else state.params
    model = LanguageModel(
        path=str(directory.model),
        arch=models.arch,
        params=params,
        tokenizer=models.trained.tokenizer,
        tokenizer_info=models.trained.info,
        stop_ids=stop_ids(prepared),
    )
    template = standalone_template(model.tokenizer, prepared.data.chat_format.template)
    if is_local(directory.model):
        _save_model(Path(directory.model), model, template)
    else:
        _upload_model(directory.model, model, template)
    logger.info("model folder: %s", directory.model)
    return directory.model


def _save_model(folder: Path, model: LanguageModel, template: str | None) -> None:
    """Write a model's folder, in which the tokenizer has the chat template of the run."""
    save_language_model(folder, model, dtype=jnp.float32, chat_template=template, overwrite=True)


def _upload_model(folder: epath.Path, model: LanguageModel, template: str | None) -> None:
    """Write a model's folder to an object store, `config.json` last: without it, it is not one."""
    # All processes that write it together must call it the same.
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    local = Path(tempfile.gettempdir()) / f"ivl_jax-model-{digest}"
    _save_model(local, model, template)
    if jax.process_index() == 0:
        (folder / "config.json").unlink(missing_ok=True)
        copy_files(local, folder, file_names(local), last=("config.json",))
        shutil.rmtree(local)


def stop_ids(prepared: Preparation) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's eos ids and the chat format's end of turn.

    Args:
        prepared: models and data of a run.

    Returns:
        Each id once.
    """
    ids = (*prepared.models.trained.info.eos_ids, *prepared.data.chat_format.stop_ids)
    return tuple(dict.fromkeys(ids))


def report_best(
    config: TrainConfig,
    directory: RunDirectory,
    objective: Objective,
    *,
    best: int | None,
    last: int,
) -> None:
    """Say where the best held-out figure was, if that is not what was saved.

    Args:
        config: of the run.
        directory: the run directory.
        objective: names the figure that is compared.
        best: the step of its best value; None without held-out demonstrations.
        last: the run's last step.
    """
    if config.method != "value":
        return
    figure, is_lowest = objective.best_by, objective.best_is == "lowest"
    what = "NLL" if figure == "nll" else figure.replace("_", " ")
    if best == 0:
        logger.warning(
            "no checkpoint has a %s held-out %s than step 0, before any training: "
            "try a lower optimizer.learning_rate or more data",
            "lower" if is_lowest else "higher",
            what,
        )
    elif best not in (None, last):
        logger.info(
            "the %s held-out %s was at step %d; to export it: "
            "python -m ivl_jax.checkpoint export-value %s OUT --step best",
            objective.best_is,
            what,
            best,
            directory.path,
        )
