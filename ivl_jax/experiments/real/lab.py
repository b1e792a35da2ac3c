"""Makes what the study of a real model compares: each stage once, kept under a hash of its inputs.

In: the target's folder, demonstrations, a budget. Out: model folders, value folders and text in a
work directory. What is there is not made again unless something that it depends on changed, and a
stage that was interrupted resumes.
"""

import dataclasses
import json
import logging
from pathlib import Path

from ivl_jax.config import TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.prompt_files import folder_fingerprint
from ivl_jax.experiments.demonstrations import Item, items_hash, select, write_demonstrations
from ivl_jax.experiments.finetune.run import fine_tune
from ivl_jax.experiments.kept_results import train_once
from ivl_jax.experiments.real.configs import (
    family_value_config,
    healing_config,
    tuning_config,
    tuning_setting,
    value_config,
)
from ivl_jax.experiments.real.exports import (
    SHARES,
    START,
    export_change,
    export_file,
    restore_change,
)
from ivl_jax.experiments.real.items import of_kind
from ivl_jax.experiments.real.layer_sibling import make_sibling
from ivl_jax.experiments.real.settings import Budget, Stage
from ivl_jax.experiments.real.text import Writing, write_dialogues
from ivl_jax.experiments.settings_key import hash_of, settings_key
from ivl_jax.json_files import write_json
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

_KEY = 10  # digits of a hash in a folder's name
_FIT = "fit.json"
_INVENTED = 0.5  # share of the dialogues whose question the target invents


class RealLaboratory:
    """Makes the models of one study."""

    def __init__(
        self,
        work_dir: Path,
        target: Path,
        items: list[Item],
        budget: Budget,
        *,
        exports: Path | None = None,
    ) -> None:
        """Write the demonstrations to files.

        Args:
            work_dir: For all results.
            target: Folder of the published model.
            items: From `real_items`.
            budget: See there.
            exports: Folder of exported stages, which are restored instead of made. Everything that
                is made then lies apart, since restored models differ a little.
        """
        self._work_dir = work_dir.absolute()
        self.exports = exports
        self._known: dict[Stage, str] = {}
        # Keys do not depend on whether a model was restored.
        self._keys = None if exports is None else RealLaboratory(work_dir, target, items, budget)
        self.target = target.absolute()
        self.items = items
        self.budget = budget
        self.target_key = folder_fingerprint(self.target)[:_KEY]
        self._data = self._written(items)
        self._docstrings = self._written(of_kind(items, "docstring"))

    def output(self, stage: Stage) -> Path:
        """What a stage leaves when it is finished; nothing is made.

        Args:
            stage: Not `measure`.

        Returns:
            The model folder or the value folder, or the file of text.
        """
        folder = self._folder(stage)
        if stage == "sibling":
            return folder
        if stage == "text":
            return folder / "dialogues.jsonl"
        if stage == "healing":
            return folder / "model"
        return folder / ("value" if stage in ("value", "family_value") else "best_nll")

    def finished(self, stage: Stage) -> bool:
        """Whether a stage has been made with today's settings.

        Args:
            stage: Not `measure`.
        """
        if stage in ("donor_tuned", "target_lora", "target_full") and not self._exported(stage):
            return (self._folder(stage) / _FIT).exists()
        return self.output(stage).exists()

    def make(self, stage: Stage) -> Path:
        """Make what a stage leaves, and what it needs, unless already done.

        Args:
            stage: Not `measure`.

        Returns:
            As `output`.

        Raises:
            InterruptedTrainingError: A training was stopped.
        """
        output, folder = self.output(stage), self._folder(stage)
        if self.finished(stage):
            return output
        if (exported := self._exported(stage)) is not None:
            start, identity = self._start(stage, make=True)
            restore_change(exported, output, start=start, identity=identity)
            return output
        for needed in self._needs(stage):
            self.make(needed)
        logger.info("stage %s: %s", stage, folder)
        budget = self.budget
        if stage == "sibling":
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_sibling(self.target, folder, first=budget.first_layers, last=budget.last_layers)
        elif stage == "text":
            model = compose(load_language_model(self.target))
            write_dialogues(model, self._questions(), folder, self._writing())
        elif stage in ("healing", "value", "family_value"):
            config = self._placed(self._config(stage), folder)
            train_once(stage, folder, output, config=lambda: config, run=run)
        else:
            self._fine_tune(stage, folder)
        return output

    def export(self, folder: Path, *, megabytes: float) -> None:
        """Write what the finished trainings changed, for another machine.

        Args:
            folder: For one file per stage.
            megabytes: Of all files together.
        """
        for stage in SHARES:
            if self.finished(stage):
                start, identity = self._start(stage)
                export_change(
                    export_file(folder, stage, self.key(stage)),
                    stage,
                    start=start,
                    tuned=self.output(stage),
                    identity=identity,
                    megabytes=megabytes,
                )

    def key(self, stage: Stage) -> str:
        """A hash of everything that a stage's result depends on.

        Args:
            stage: Not `measure`.
        """
        if self._keys is not None:
            return self._keys.key(stage)
        if stage not in self._known:
            self._known[stage] = self._new_key(stage)
        return self._known[stage]

    def _new_key(self, stage: Stage) -> str:
        if stage == "sibling":
            layers = (self.budget.first_layers, self.budget.last_layers)
            return hash_of(["sibling", self.target_key, layers])
        if stage == "text":
            return hash_of(["text", self.target_key, self._questions(), self._writing()])
        config = self._config(stage)
        # Where the target lies does not count; which one it is does.
        mapping = json.dumps([settings_key(self._located(config), work_dir=self._work_dir), stage])
        return hash_of([mapping, self.target_key])

    def _folder(self, stage: Stage) -> Path:
        made = "made" if self.exports is None else "made_from_exports"
        return self._work_dir / made / f"{stage}-{self.key(stage)[:_KEY]}"

    def _exported(self, stage: Stage) -> Path | None:
        """The exported file of a stage; None where there is none."""
        if self.exports is None or stage not in SHARES:
            return None
        file = export_file(self.exports, stage, self.key(stage))
        return file if file.exists() else None

    def _start(self, stage: Stage, *, make: bool = False) -> tuple[Path, str]:
        """The folder of the model that a training starts from, and what identifies the model."""
        start = START[stage]
        if start is None:
            return self.target, self.target_key
        return self.make(start) if make else self.output(start), self.key(start)

    def _needs(self, stage: Stage) -> tuple[Stage, ...]:
        needs: dict[Stage, tuple[Stage, ...]] = {
            "healing": ("sibling", "text"),
            "value": ("healing",),
            "donor_tuned": ("healing",),
        }
        return needs.get(stage, ())

    def _config(self, stage: Stage) -> TrainConfig:
        """The config of a stage that trains, without the paths of a run."""
        budget = self.budget
        if stage == "healing":
            return healing_config(
                budget,
                sibling=self.output("sibling"),
                target=self.target,
                text=self.output("text"),
            )
        if stage == "value":
            return value_config(budget, donor=self.output("healing"), data=self._data)
        if stage == "family_value":
            return family_value_config(budget, data=self._docstrings)
        model = self.output("healing") if stage == "donor_tuned" else self.target
        rank = budget.rank if stage == "target_lora" else 0
        config = tuning_config(budget, model=model, rank=rank)
        # Its demonstrations are written by the run itself: their hash stands for them.
        data = dataclasses.replace(config.data, train=(items_hash(self.items), f"rank {rank}"))
        return dataclasses.replace(config, data=data)

    def _located(self, config: TrainConfig) -> TrainConfig:
        """A config with a word in the place of the target's folder."""
        text = str(self.target)

        def word(path: str) -> str:
            return "TARGET" if path == text else path

        base, distil = config.base, config.distil
        return dataclasses.replace(
            config,
            base=dataclasses.replace(base, path=word(base.path)),
            distil=dataclasses.replace(distil, teacher=word(distil.teacher)),
        )

    def _placed(self, config: TrainConfig, folder: Path) -> TrainConfig:
        data = dataclasses.replace(config.data, data_dir=str(self._work_dir / "data"))
        return dataclasses.replace(config, run_dir=str(folder), data=data)

    def _fine_tune(self, stage: Stage, folder: Path) -> None:
        rank = self.budget.rank if stage == "target_lora" else 0
        config = self._config(stage)
        fit = fine_tune(
            config,
            tuning_setting(config, rank=rank),
            self.items,
            run_dir=folder,
            data_dir=self._work_dir / "data",
            on_point=lambda point: logger.info("%s: %s", stage, point),
        )
        curve = [point._asdict() for point in fit.curve]
        write_json(folder / _FIT, {"curve": curve, "seconds": fit.seconds})

    def _questions(self) -> list[str]:
        """The training questions that the target answers, of all kinds alike."""
        train = select(self.items, "train")
        number = min(len(train), self.budget.dialogues - self._writing().invented)
        chosen = sorted(train, key=lambda item: hash_of(["asked", item.question]))[:number]
        return [item.question for item in chosen]

    def _writing(self) -> Writing:
        return Writing(
            invented=round(self.budget.dialogues * _INVENTED),
            max_new_tokens=self.budget.text_tokens,
            temperature=self.budget.temperature,
        )

    def _written(self, items: list[Item]) -> dict[str, Path]:
        """Files of the splits that trainings read; their names tell what is in them."""
        folder = self._work_dir / "inputs" / items_hash(items)[:_KEY]
        files = write_demonstrations(folder, items)
        return {split: files[split] for split in ("train", "validation")}
