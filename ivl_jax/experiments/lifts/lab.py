"""Trains and measures what the study of lifts compares, each once.

In: `Row`s. Out: JSON files in a work directory, and the trained value networks. Existing ones are
not made again; a training that was interrupted resumes.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import load_value
from ivl_jax.config import TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.calibration import Calibration, calibrate
from ivl_jax.experiments.answer_scores import answer_rows
from ivl_jax.experiments.changed_config import with_options
from ivl_jax.experiments.demonstrations import Item, items_hash, select, target_rows
from ivl_jax.experiments.family.corpus import load_corpus
from ivl_jax.experiments.kept_results import kept_record, measure_once, train_once
from ivl_jax.experiments.lifts.plan import CHANGES, Budget, Lift, Row, Split
from ivl_jax.experiments.measure import (
    FACT_TOKENS,
    family_map,
    response_nll,
    running_texts,
    share_answered,
)
from ivl_jax.experiments.pretrain_family import Options, make_model
from ivl_jax.experiments.settings_key import family_weights, hash_of
from ivl_jax.experiments.transfer.lab import Laboratory
from ivl_jax.experiments.transfer.matrix import recipe
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import load_language_model

_ROWS_TOGETHER = 16


class LiftsLaboratory:
    """Trains and measures on one set of demonstrations."""

    def __init__(
        self, work_dir: Path, config: TrainConfig, items: list[Item], budget: Budget
    ) -> None:
        """Write the demonstrations to files.

        Args:
            work_dir: For all results.
            config: The demo's; every training starts from it.
            items: From `build_items`.
            budget: How much is trained and calibrated on.
        """
        self._work_dir, self._items, self._budget = work_dir, items, budget
        self._matrix = Laboratory(work_dir, config, items)
        self._rows = target_rows(items, budget.target_rows)
        given = set(self._rows)
        self._splits: dict[Split, list[Item]] = {
            "validation": [item for item in select(items, "validation") if item not in given],
            "test": select(items, "test"),
        }

    @property
    def measured_dir(self) -> Path:
        """Folder of the measurements' files."""
        return self._work_dir / "lifts"

    def measure(self, row: Row) -> dict[str, Any]:
        """Measure a target with a value network, unless already done.

        Args:
            row: Which one; its value network is trained first.

        Returns:
            `nll` (nats per answer token); on the test split also `exact_match` (of the questions on
            facts); where they are calibrated, `strength` and `temperature`.

        Raises:
            InterruptedTrainingError: a training was stopped.
        """
        key = self._key(row)
        return measure_once(row.name, self._file(row), key, lambda: self._figures(row))

    def kept(self, row: Row) -> dict[str, Any] | None:
        """A measurement that was made with today's items and settings; nothing is trained."""
        return kept_record(self._file(row), self._key(row))

    def _figures(self, row: Row) -> dict[str, Any]:
        base = load_language_model(str(family_folder(row.target)))
        value = load_value(self._train(row.lift, row.seed))
        path = self._work_dir / "maps" / f"{row.target}-{row.lift}-{row.seed}.safetensors"
        file = family_map(base, value, running_texts(self._items), path=path)
        model, fit = compose(base, value, maps=[file]), Calibration((1.0,), 1.0)
        record: dict[str, Any] = {}
        if row.lift == "calibrated":
            rows, masks = answer_rows(model, [item.given for item in self._rows])
            fit = calibrate(model, rows, masks, batch_size=_ROWS_TOGETHER)
            model = dataclasses.replace(model, strengths=fit.strengths)
            record |= {"strength": fit.strengths[0], "temperature": fit.temperature}
        items = self._splits[row.split]
        record["nll"] = response_nll(model, items, temperature=fit.temperature)
        if row.split == "test":
            facts = [item for item in items if item.kind == "fact"]
            record["exact_match"] = share_answered(model, facts)
        return record

    def _file(self, row: Row) -> Path:
        return self.measured_dir / f"{row.name}.json"

    def _key(self, row: Row) -> dict[str, str]:
        """Hashes of what a row is made of."""
        training = self._matrix.training_key(recipe(row.seed))
        made_of = [row.name, self._budget, CHANGES.get(row.lift), items_hash(self._rows)]
        made_of += [training, family_weights(row.target), FACT_TOKENS]
        return {
            "items_sha256": items_hash(self._splits[row.split]),
            "settings_sha256": hash_of(made_of),
        }

    def _train(self, lift: Lift, seed: int) -> Path:
        """The value folder of a lift."""
        if lift in ("plain", "calibrated"):
            return self._matrix.train(recipe(seed))
        name = f"{lift}_seed{seed}-{self._training_key(lift, seed)}"
        run_dir = self._work_dir / "trained" / name
        return train_once(
            name,
            run_dir,
            run_dir / "value",
            config=lambda: self._config(lift, seed, run_dir),
            run=run,
        )

    def _training_key(self, lift: Lift, seed: int) -> str:
        """Hash of what a lift's value network is made of."""
        made_of = [self._matrix.training_key(recipe(seed)), lift, CHANGES.get(lift), self._budget]
        return hash_of(made_of)[:10]

    def _config(self, lift: Lift, seed: int, run_dir: Path) -> TrainConfig:
        """The demo's config with what is different."""
        config = self._matrix.config_of(recipe(seed), run_dir)
        config = with_options(config, CHANGES.get(lift, {}))
        if lift == "bases":
            early = dataclasses.replace(config.base, path=str(self._early()))
            alone = dataclasses.replace(config.base, path="")
            return dataclasses.replace(config, base=alone, bases=(config.base, early))
        if lift == "adapted":
            start = self._matrix.start_of(recipe(seed))
            tables = {
                "base": {"path": str(family_folder("L"))},
                "value": {"path": str(start)},
                "step": {"max_steps": self._budget.adapted_steps},
            }
            return with_options(config, tables)
        return config

    def _early(self) -> Path:
        """S after less pre-training, with S's tokenizer; an interrupted pre-training resumes."""
        folder = self._work_dir / f"early-{self._budget.early_epochs:g}"
        if not (folder / "S" / "manifest.json").exists():
            work_dir = folder / "pretraining"
            # A tokenizer trained on another Python's library would be another one.
            shutil.copytree(family_folder("S"), work_dir / "tokenizer_byte", dirs_exist_ok=True)
            options = Options(epochs=self._budget.early_epochs, out=folder, work_dir=work_dir)
            make_model("S", load_corpus(), options)
        return folder / "S"
