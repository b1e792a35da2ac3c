"""The config of each training of the post-training study.

In: a `Run`, and the files that it reads. Out: the demo config of its kind with the study's changes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ivl_jax.assets import config_file, family_folder
from ivl_jax.config import BaseConfig, TrainConfig, load_config
from ivl_jax.experiments.post_training.plan import Kind, Run

_CONFIGS: dict[Kind, str] = {
    "sft": "demo.toml",
    "dpo": "demo_dpo.toml",
    "grpo": "demo_grpo.toml",
    "distil": "demo.toml",
    "fold": "demo_distil.toml",
}
# Often enough that a run that is killed loses a minute.
_CHECKPOINT_EVERY = 50
GRPO_STEPS = 400
DPO_EPOCHS = 2.0
# The demo's 10 passes over the training questions alone leave half of the facts behind.
_FOLD_EPOCHS = 3.0
_EVALUATE_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the study sets beside the demo configs."""

    share: float
    """Of the demonstrations, that every start is trained on."""
    epochs: float
    """Passes over that share."""
    samples: int
    """Answers sampled per question, from which the rejected one is chosen."""
    grpo_steps: int = GRPO_STEPS
    """Optimizer steps of GRPO."""
    dpo_epochs: float = DPO_EPOCHS
    """Passes over the pairs."""


class Inputs(NamedTuple):
    """What a run reads."""

    data: Mapping[str, Path]
    """Split → file."""
    data_dir: Path
    """For tokenised rows."""
    start: Path | None
    """The model folder that the trained network starts from; None: the family's."""
    teacher: Path | None
    """The model folder or the value folder that the run's teacher made."""


def config_of(run: Run, settings: Settings, inputs: Inputs, *, run_dir: Path) -> TrainConfig:
    """The demo config of a run's kind, with the study's changes and the run's own paths.

    Args:
        run: What to train, its learning rate chosen.
        settings: Of the study.
        inputs: What it reads.
        run_dir: The run directory.

    Returns:
        Its config.
    """
    config = load_config(config_file(_CONFIGS[run.kind]), TrainConfig)
    step, optimizer, penalty = config.step, config.optimizer, config.penalty
    if run.kind == "sft":
        step = dataclasses.replace(step, epochs=settings.epochs)
    if run.kind == "dpo":
        step = dataclasses.replace(step, epochs=settings.dpo_epochs)
    if run.kind == "fold":
        step = dataclasses.replace(step, epochs=_FOLD_EPOCHS)
    if run.kind == "grpo":
        step = dataclasses.replace(step, max_steps=settings.grpo_steps)
    if run.rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=run.rate)
    own = family_folder(run.model)
    base, value = own, config.value
    if run.alone:
        penalty = dataclasses.replace(penalty, kind="none", weight=0.0)
        base = inputs.start or own
    else:
        value = dataclasses.replace(value, path=str(inputs.start or family_folder("S")))
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        objective="distil" if run.kind == "distil" else config.objective,
        seed=run.seed,
        method="sft" if run.alone else "value",
        base=BaseConfig(path=str(base)),
        value=value,
        distil=_distil(config, run, inputs.teacher),
        data=dataclasses.replace(
            config.data,
            **{split: (str(file),) for split, file in inputs.data.items()},
            data_dir=str(inputs.data_dir),
        ),
        optimizer=optimizer,
        penalty=penalty,
        step=step,
        logging=dataclasses.replace(
            config.logging,
            evaluate_every=_EVALUATE_EVERY if run.kind == "grpo" else 0,
            checkpoint_every=_CHECKPOINT_EVERY,
        ),
    )


def _distil(config: TrainConfig, run: Run, teacher: Path | None) -> Any:
    if run.teacher is None:
        return config.distil
    assert teacher is not None, "a run with a teacher is given its folder"
    if run.teacher.alone:
        return dataclasses.replace(config.distil, teacher=str(teacher), values=())
    base = str(family_folder(run.model))
    return dataclasses.replace(config.distil, teacher=base, values=(str(teacher),))


def shown_settings(configs: Mapping[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """What the report says about the trainings.

    Args:
        configs: Config by a name.

    Returns:
        Name → the settings that its sentences quote.
    """
    return {
        name: {
            "learning_rate": config.optimizer.learning_rate,
            "batch_size": config.step.batch_size,
            "max_steps": config.step.max_steps,
            "epochs": config.step.epochs,
            "penalty": config.penalty.weight,
            "beta": config.preference.beta,
            "sft_weight": config.preference.sft_weight,
            "rewards": list(config.grpo.rewards),
            "group_size": config.grpo.group_size,
            "kl_weight": config.grpo.kl_weight,
        }
        for name, config in configs.items()
    }
