"""Runs and measures the settings of the sweep of references, each once.

In: settings. Out: their records, models and test figures in a work directory, under a hash of the
effective config, and what is published of them. Existing ones are not made again.
"""

import dataclasses
import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ivl_jax.assets import family_folder
from ivl_jax.config import TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.demonstrations import Item, items_hash, new_items, select
from ivl_jax.experiments.family.continued import (
    continue_pretraining,
    continued_folder,
)
from ivl_jax.experiments.finetune.plan import SEEDS, STAGES, chosen, finished, missing_runs
from ivl_jax.experiments.finetune.run import fine_tune, items_of, run_config, run_key
from ivl_jax.experiments.finetune.settings import (
    Criterion,
    Curve,
    Kinds,
    Model,
    Point,
    Setting,
    best_point,
)
from ivl_jax.experiments.held_out_figures import answered, figures_on
from ivl_jax.experiments.kept_results import kept_record
from ivl_jax.experiments.measure import share_answered
from ivl_jax.experiments.pretrain_family import XL_FOLDER
from ivl_jax.json_files import write_json
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

PROGRAM = "python -m ivl_jax.experiments.finetune_sweep"


class Sweep:
    """Runs and measures settings, each once."""

    def __init__(
        self, work_dir: Path, config: TrainConfig, items: list[Item], *, xl: Path = XL_FOLDER
    ) -> None:
        """Read what has been finished in the work directory.

        Args:
            work_dir: For all results.
            config: The demo's.
            items: From `build_items`.
            xl: The folder of XL, which is not shipped; needed if it is fine-tuned.
        """
        self._xl = xl
        self._work_dir = work_dir
        self._config = config
        self._items = items
        self._test_sha256 = items_hash(select(items, "test"))
        self._records: dict[Setting, dict[str, Any]] = {}
        for file in sorted((work_dir / "runs").glob("*/record.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            setting = Setting(**record["setting"])
            # A run on other items, as those of another Python, or with another config is left
            # where it is.
            if record["items_sha256"] == items_hash(items_of(items, setting)) and (
                not self._here(setting.model) or record["key"] == self._key(setting)
            ):
                self._records[setting] = record

    def adopt(self, published: Path, model: Model) -> None:
        """Take over the runs of a published record, but those of other settings or demonstrations.

        Their test figures are taken too, if they are about today's items.

        Args:
            published: The record's file; a missing one has no runs.
            model: Whose runs.
        """
        if not published.exists():
            return
        found = json.loads(published.read_text(encoding="utf-8"))
        for record in found["runs"]:
            setting = Setting(**record["setting"])
            if setting.model != model or setting in self._records:
                continue
            _, key = self._planned(setting)
            if record["key"] == key:
                run_dir = self._work_dir / "runs" / key
                run_dir.mkdir(parents=True, exist_ok=True)
                write_json(run_dir / "record.json", record, indent=2)
                self._records[setting] = record
        keys = {record["key"] for record in found["runs"]}
        for one in found["chosen"]:
            for test in one["test"] if one["model"] == model else ():
                figures = {name: value for name, value in test.items() if name != "seed"}
                setting = dataclasses.replace(Setting(**one["setting"]), seed=test["seed"])
                run = self._records.get(setting)
                if run is None or run["key"] not in keys:
                    continue
                if not self._tested(setting, one["criterion"]):
                    write_json(self._test_file(run, one["criterion"]), figures, indent=2)

    @property
    def _continued_dir(self) -> Path:
        return self._work_dir / "continued"

    @property
    def tried(self) -> dict[Setting, Curve]:
        """Every finished run with its validation curve."""
        return {
            setting: [Point(**point) for point in record["curve"]]
            for setting, record in self._records.items()
        }

    def run(self, setting: Setting) -> None:
        """Fine-tune with a setting and keep its record.

        Args:
            setting: One that has not been tried.
        """
        config, key = self._planned(setting)
        run_dir = self._work_dir / "runs" / key
        logger.info("run %s: %s", key, setting)
        fit = fine_tune(
            config,
            setting,
            self._items,
            run_dir=run_dir,
            data_dir=self._work_dir / "data",
            on_point=lambda point: logger.info("%s %s", key, point),
        )
        record = {
            "key": key,
            "setting": dataclasses.asdict(setting),
            "items_sha256": items_hash(items_of(self._items, setting)),
            "curve": [point._asdict() for point in fit.curve],
            "train_loss": fit.train_loss,
            "seconds": round(fit.seconds, 1),
            "python": platform.python_version(),
            "jax": jax.__version__,
        }
        write_json(run_dir / "record.json", record, indent=2)
        self._records[setting] = record

    def model(self, setting: Setting, criterion: Criterion) -> Path:
        """The model of an early-stopped run, which is made if it is not here.

        Args:
            setting: Which run.
            criterion: What its step is chosen by.

        Returns:
            The model's folder.
        """
        run_dir = self._work_dir / "runs" / self._key(setting)
        folder = run_dir / f"best_{criterion}"
        # Of a run that was killed there is a model and no record, of an adopted one no model.
        if setting not in self._records or not folder.exists():
            self.run(setting)
        return folder

    def test(self, setting: Setting, criterion: Criterion) -> dict[str, Any]:
        """Measure the model of an early-stopped run on the test split, unless already done.

        Args:
            setting: Which run.
            criterion: What its step is chosen by.

        Returns:
            As `figures_on`, and of L-continued `new_exact_match`, on people that no demonstration
            is about; `items_sha256`, of the test items.
        """
        if kept := self._tested(setting, criterion):
            return kept
        model = compose(load_language_model(str(self.model(setting, criterion))))
        test = select(self._items, "test")
        figures = figures_on(model, test, answered(model, test))
        if setting.model == "L-continued":
            figures["new_exact_match"] = share_answered(model, new_items())
        figures["items_sha256"] = self._test_sha256
        write_json(self._test_file(self._records[setting], criterion), figures, indent=2)
        return figures

    def record(self) -> dict[str, Any]:
        """Everything that is known by now: all runs, and for each study the chosen ones."""
        tried = self.tried
        studies: dict[tuple[Model, Kinds], None] = {}
        for stage in STAGES:
            studies[stage.model, stage.kinds] = None
        found = []
        for model, kinds in studies:
            for criterion, setting in chosen(tried, model, kinds).items():
                seeds = [dataclasses.replace(setting, seed=seed) for seed in SEEDS]
                found.append(
                    {
                        "model": model,
                        "kinds": kinds,
                        "criterion": criterion,
                        "setting": dataclasses.asdict(setting),
                        "step": best_point(tried[setting], criterion).step,
                        "finished": finished(tried, model, kinds),
                        "test": [
                            self._tested(one, criterion) | {"seed": one.seed}
                            for one in seeds
                            if one in tried and self._tested(one, criterion)
                        ],
                    }
                )
        runs = [self._records[setting] for setting in sorted(tried, key=str)]
        return {"command": PROGRAM, "chosen": found, "runs": runs}

    def reference(self, model: Model) -> dict[str, Any] | None:
        """What is recorded of a model's best fine-tunings on both kinds of demonstrations.

        Args:
            model: The model.

        Returns:
            The content of `references.record_file`; None before the search has ended.
        """
        tried = self.tried
        best = chosen(tried, model, "both")
        if not best or not finished(tried, model, "both"):
            return None
        alike = [one for one in tried if (one.model, one.kinds, one.seed) == (model, "both", 0)]
        return {
            "model": model,
            "test_items_sha256": self._test_sha256,
            "chosen": {
                criterion: {
                    "setting": dataclasses.asdict(setting),
                    "test": [
                        self.reference_test(dataclasses.replace(setting, seed=seed), criterion)
                        for seed in SEEDS
                    ],
                }
                for criterion, setting in best.items()
            },
            "tried": len(alike),
            "command": f"{PROGRAM} --models {model}",
            "python": platform.python_version(),
            "jax": jax.__version__,
        }

    def reference_test(self, setting: Setting, criterion: Criterion) -> dict[str, Any]:
        """A run's test and validation figures; it is made if it is not here.

        Args:
            setting: Which run.
            criterion: What its step is chosen by.

        Returns:
            As `test`, with `seed`, `step` and, with the prefix `validation_`, the curve's figures
            there.
        """
        if setting not in self._records:
            self.run(setting)
        point = best_point(self.tried[setting], criterion)._asdict()
        step = point.pop("step")
        validation = {f"validation_{name}": value for name, value in point.items()}
        return {"seed": setting.seed, "step": step, **validation, **self.test(setting, criterion)}

    def seconds_per_epoch(self, setting: Setting) -> float | None:
        """Mean over the finished runs of the same model and demonstrations; None without one."""
        alike = [
            (record["seconds"], one.epochs)
            for one, record in self._records.items()
            if (one.model, one.kinds) == (setting.model, setting.kinds)
        ]
        return sum(s for s, _ in alike) / sum(e for _, e in alike) if alike else None

    def estimate(self) -> str:
        """How long the runs take that can be named by now; a best at an edge asks for more."""
        tried = self.tried
        left = {setting: None for stage in STAGES for setting in missing_runs(stage, tried)}
        paces = {setting: self.seconds_per_epoch(setting) for setting in left}
        known = [pace * setting.epochs for setting, pace in paces.items() if pace is not None]
        unknown = len(left) - len(known)
        return f"in all {len(left)} that can be named by now, about {sum(known) / 60:.0f} min" + (
            f" and {unknown} of unknown length" if unknown else ""
        )

    def _key(self, setting: Setting) -> str:
        return self._planned(setting)[1]

    def _planned(self, setting: Setting) -> tuple[TrainConfig, str]:
        """The config of a setting's run, and its key."""
        folder = self._folder(setting.model)
        config = run_config(self._config, setting, model=folder)
        return config, run_key(config, setting, self._items, model=folder)

    def _test_file(self, record: Mapping[str, Any], criterion: Criterion) -> Path:
        """Where the test figures of a finished run are, or will be."""
        return self._work_dir / "runs" / record["key"] / f"test_{criterion}.json"

    def _tested(self, setting: Setting, criterion: Criterion) -> dict[str, Any]:
        """A finished run's figures on today's test items; empty: there are none."""
        if (record := self._records.get(setting)) is None:
            return {}
        wanted = {"items_sha256": self._test_sha256}
        return kept_record(self._test_file(record, criterion), wanted) or {}

    def _here(self, model: Model) -> bool:
        """Whether a model's folder is there; the shipped ones always are."""
        if model == "XL":
            return (self._xl / "config.json").exists()
        return model != "L-continued" or continued_folder("L", self._continued_dir).exists()

    def _folder(self, model: Model) -> Path:
        if model == "L-continued":
            return continue_pretraining("L", work_dir=self._continued_dir)
        if model == "XL":
            return self._xl
        if model == "real":
            raise ValueError("the sweep fine-tunes the embedded family; expected one of its models")
        return family_folder(model)
