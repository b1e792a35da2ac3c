"""The trainings of the study of a real model, as configs.

In: a `Budget`, and the folders that a training reads. Out: its `TrainConfig`, or the setting of a
fine-tuning for `finetune.run`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ivl_jax.assets import config_file, family_folder
from ivl_jax.config import (
    BaseConfig,
    DataConfig,
    DistilConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    RowsConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
    load_config,
)
from ivl_jax.experiments.finetune.settings import Setting
from ivl_jax.experiments.real.settings import Budget

# A run that is killed loses at most a few minutes: a step takes 10 to 20 s.
_CHECKPOINT_EVERY = 10
_LOG_EVERY = 5
_WARMUP = 0.05


def healing_config(budget: Budget, *, sibling: Path, target: Path, text: Path) -> TrainConfig:
    """The distillation of the sibling on every token of text that the target wrote.

    Args:
        budget: Says how long.
        sibling: Folder of the student.
        target: Folder of the teacher.
        text: Dialogues.

    Returns:
        The config, without the paths of a run.
    """
    return dataclasses.replace(
        _config(budget, tokens=budget.healing_tokens, rate=budget.healing_rate),
        objective="distil",
        method="sft",
        base=BaseConfig(path=str(sibling)),
        distil=DistilConfig(teacher=str(target), tokens="all"),
        penalty=PenaltyConfig(kind="none", weight=0.0),
        data=_data(budget, {"train": text}),
    )


def value_config(budget: Budget, *, donor: Path, data: Mapping[str, Path]) -> TrainConfig:
    """A value network that begins as the donor and is trained beside it.

    Args:
        budget: Says how long.
        donor: Folder of the base.
        data: Split → demonstrations.

    Returns:
        The config, without the paths of a run.
    """
    return dataclasses.replace(
        _config(budget, tokens=budget.value_tokens, rate=budget.value_rate),
        base=BaseConfig(path=str(donor)),
        value=ValueConfig(init="pretrained", path=str(donor)),
        penalty=PenaltyConfig(kind="l1", weight=budget.penalty),
        data=_data(budget, data),
    )


def family_value_config(budget: Budget, *, data: Mapping[str, Path]) -> TrainConfig:
    """A value network beside S of the embedded family, trained as the demo's.

    Args:
        budget: Says how long.
        data: Split → demonstrations.

    Returns:
        The config, without the paths of a run.
    """
    config = load_config(config_file("demo.toml"), TrainConfig)
    family = str(family_folder("S"))
    batch = config.step.batch_size * config.data.max_length
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, path=family),
        value=dataclasses.replace(config.value, path=family),
        data=dataclasses.replace(
            config.data, **{split: (str(file),) for split, file in data.items()}
        ),
        step=dataclasses.replace(config.step, max_steps=max(1, budget.value_tokens // batch)),
    )


def tuning_config(budget: Budget, *, model: Path, rank: int) -> TrainConfig:
    """The fine-tuning of a model on the demonstrations; `finetune.run` adds them.

    Args:
        budget: Says how long.
        model: Folder of the model.
        rank: Of its adapter; 0: all parameters are trained.

    Returns:
        The config, without the paths of a run.
    """
    rate = budget.lora_rate if rank else budget.tuning_rate
    return dataclasses.replace(
        _config(budget, tokens=budget.tuning_tokens, rate=rate),
        method="sft",
        base=BaseConfig(path=str(model)),
        penalty=PenaltyConfig(kind="none", weight=0.0),
        data=_data(budget, {}),
    )


def tuning_setting(config: TrainConfig, *, rank: int) -> Setting:
    """What `finetune.run` needs beside the config of a fine-tuning.

    Args:
        config: From `tuning_config`.
        rank: Of the adapter.

    Returns:
        The setting.
    """
    return Setting(
        "real",
        "all",
        learning_rate=config.optimizer.learning_rate,
        epochs=config.step.epochs,
        rank=rank,
        batch_size=config.step.batch_size,
    )


def _config(budget: Budget, *, tokens: int, rate: float) -> TrainConfig:
    steps = budget.steps(tokens)
    return TrainConfig(
        optimizer=OptimizerConfig(learning_rate=rate, warmup_fraction=_WARMUP),
        step=StepConfig(max_steps=steps, batch_size=budget.rows),
        logging=LoggingConfig(
            log_every=_LOG_EVERY,
            evaluate_every=0,
            evaluation_rows=4 * budget.rows,
            checkpoint_every=_CHECKPOINT_EVERY,
            keep_checkpoints=1,
        ),
        mesh=MeshConfig(fsdp=1),  # a batch of a few rows does not divide over more
    )


def _data(budget: Budget, files: Mapping[str, Path]) -> DataConfig:
    train, validation = (
        (str(files[split]),) if split in files else () for split in ("train", "validation")
    )
    return DataConfig(
        train=train,
        validation=validation,
        rows=RowsConfig(format="messages"),
        max_length=budget.length,
    )
