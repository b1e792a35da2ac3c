"""Runs the matrix's trainings and measurements, each once, to model folders and JSON files.

In: `Training`s and `Measurement`s. Out: their folders and files in a work directory. Existing ones
are not made again, so an interrupted run resumes.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import ValueNetwork, load_value
from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.demonstrations import Item, items_hash, select, write_demonstrations
from ivl_jax.experiments.family.continued import continue_pretraining, new_facts, new_items
from ivl_jax.experiments.family.facts import build_facts, split_of_person
from ivl_jax.experiments.family.recall import recall
from ivl_jax.experiments.finetune.references import read_reference
from ivl_jax.experiments.finetune.run import run_config
from ivl_jax.experiments.finetune.settings import Model, Setting, best_point
from ivl_jax.experiments.finetune.sweep import PROGRAM, Sweep
from ivl_jax.experiments.kept_results import kept_record, measure_once, train_once
from ivl_jax.experiments.measure import (
    family_map,
    response_nll,
    running_texts,
    share_answered,
)
from ivl_jax.experiments.pretrain_family import XL_FOLDER
from ivl_jax.experiments.transfer.matrix import Base, Measurement, Training
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import LanguageModel, load_language_model

_LONG = 1 << 20  # more steps than any training has


class Laboratory:
    """Trains and measures on one set of demonstrations."""

    def __init__(
        self, work_dir: Path, config: TrainConfig, items: list[Item], *, xl: Path = XL_FOLDER
    ) -> None:
        """Write the demonstrations to files.

        Args:
            work_dir: For all results.
            config: The demo's; every training starts from it.
            items: From `build_items`.
            xl: The folder of XL, which is not shipped.
        """
        self._work_dir, self._xl = work_dir, xl
        # Only the result counts: intermediate evaluations and saves take a third of the time.
        quiet = dataclasses.replace(config.logging, evaluate_every=0, checkpoint_every=_LONG)
        self._config = dataclasses.replace(config, logging=quiet)
        self._items = items
        self._files = write_demonstrations(work_dir / "demonstrations", items)
        self._sweep = Sweep(work_dir / "references", config, items, xl=xl)
        self._test = select(items, "test")
        self._test_sha256 = items_hash(self._test)
        self._validation = select(items, "validation")
        self._facts = [item for item in self._test if item.kind == "fact"]

    @property
    def measured_dir(self) -> Path:
        """Folder of the measurements' files."""
        return self._work_dir / "measured"

    def measure(self, measurement: Measurement) -> dict[str, Any]:
        """Measures a composition on the test split, unless already done.

        Args:
            measurement: Which one; the models it needs are trained first. The figures of a
                fine-tuned model alone are the recorded ones if they are about the same items.

        Returns:
            `nll` (nats per answer token), `validation_nll` (the same on the validation split, for
            choices), `exact_match` (share of fact questions answered word for word), and on a base
            that knows the new facts `new_exact_match`. Of a base alone also `recall`, the share of
            the same facts that it knows when it is prompted with the statement itself, and
            `new_recall`. Beside them what was measured: `items_sha256`, and the settings of
            fine-tuned models.

        Raises:
            InterruptedTrainingError: a training was stopped.
        """
        name = measurement.name
        file = self.measured_dir / f"{name}.json"
        return measure_once(name, file, self._key(measurement), lambda: self._figures(measurement))

    def possible(self, measurement: Measurement) -> bool:
        """Whether its base is here, and the settings of fine-tuned models have been chosen."""
        here = measurement.base != "XL" or (self._xl / "config.json").exists()
        return here and _settings_recorded(measurement)

    def kept(self, measurement: Measurement) -> dict[str, Any] | None:
        """A measurement that was made with today's items and settings; nothing is trained."""
        if not _settings_recorded(measurement):
            return None
        file = self.measured_dir / f"{measurement.name}.json"
        return kept_record(file, self._key(measurement))

    def train(self, training: Training) -> Path:
        """Trains, unless already done; an interrupted training resumes.

        Args:
            training: What to train.

        Returns:
            The value folder, or the model folder of a fine-tuned model.

        Raises:
            InterruptedTrainingError: it was stopped.
        """
        if training.method == "sft":
            return self._sweep.model(self.setting_of(training), training.chosen_by)
        run_dir = self._work_dir / "trained" / training.name
        return train_once(
            training.name,
            run_dir,
            run_dir / "value",
            config=lambda: self.config_of(training, run_dir),
            run=run,
        )

    def setting_of(self, training: Training) -> Setting:
        """The recorded setting of a fine-tuned model, with the training's seed.

        Args:
            training: Of the method `sft`.

        Returns:
            The setting.

        Raises:
            ConfigError: No setting has been chosen for this model.
        """
        (model,) = training.bases
        reference = read_reference(cast(Model, model), training.chosen_by)
        if reference is None:
            raise ConfigError(
                f"{model} fine-tuned, chosen by {training.chosen_by}: no setting is recorded: "
                f"run {PROGRAM} --models {model}"
            )
        return dataclasses.replace(reference.setting, seed=training.seed)

    def _key(self, measurement: Measurement) -> dict[str, str]:
        """What a kept measurement has to be about."""
        key = {"items_sha256": self._test_sha256}
        if tuned := _tuned(measurement):
            key["fine_tuned"] = "; ".join(str(self.setting_of(one)) for one in tuned)
        return key

    def _figures(self, measurement: Measurement) -> dict[str, Any]:
        base, alone = measurement.base, not measurement.terms
        if isinstance(base, Training) and alone:
            return self._reference_figures(base)
        model = self._compose(measurement)
        record = {
            "nll": response_nll(model, self._test),
            "validation_nll": response_nll(model, self._validation),
            "exact_match": share_answered(model, self._facts),
        }
        if base == "L-continued":
            record["new_exact_match"] = share_answered(model, new_items())
        if alone:
            known = [fact for fact in build_facts() if split_of_person(fact.person) == "test"]
            record["recall"] = recall(model, known)
            if base == "L-continued":
                record["new_recall"] = recall(model, new_facts())
        return record

    def _reference_figures(self, training: Training) -> dict[str, Any]:
        """The recorded figures of a fine-tuned model; made again if they are of other items."""
        (model,) = training.bases
        recorded = read_reference(
            cast(Model, model), training.chosen_by, items_sha256=self._test_sha256
        )
        if recorded is not None and training.seed in recorded.tests:
            figures = recorded.tests[training.seed]
        else:
            setting = self.setting_of(training)
            figures = self._sweep.test(setting, training.chosen_by)
            curve = self._sweep.tried[setting]
            nll = best_point(curve, training.chosen_by).nll
            figures = figures | {"validation_nll": nll}
        wanted = ("nll", "validation_nll", "exact_match", "new_exact_match")
        return {name: figures[name] for name in wanted if name in figures}

    def config_of(self, training: Training, run_dir: Path) -> TrainConfig:
        """The demo's config with the training's changes.

        Args:
            training: What to train.
            run_dir: The run directory.

        Returns:
            Its config.
        """
        first, *others = (
            dataclasses.replace(self._config.base, path=str(self._folder(base)))
            for base in training.bases
        )
        if training.method == "sft":
            config = run_config(self._config, self.setting_of(training), model=Path(first.path))
            return self._with_paths(config, run_dir)
        config = self._config
        kind, weight = training.penalty
        starts = training.init == "base" or training.connection == "linear"
        value_path = "" if starts else str(self._folder(training.init_model))
        optimizer = config.optimizer
        if training.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=training.learning_rate)
        config = dataclasses.replace(
            config,
            seed=training.seed,
            base=dataclasses.replace(config.base, path="") if others else first,
            bases=(first, *others) if others else (),
            value=dataclasses.replace(
                config.value,
                init=training.init,
                path=value_path,
                connection=training.connection,
                depths=training.depths,
            ),
            penalty=dataclasses.replace(config.penalty, kind=kind, weight=weight),
            optimizer=optimizer,
        )
        return self._with_paths(config, run_dir)

    def _with_paths(self, config: TrainConfig, run_dir: Path) -> TrainConfig:
        """A config with a run's own folders."""
        return dataclasses.replace(
            config,
            run_dir=str(run_dir),
            data=dataclasses.replace(
                config.data,
                train=(str(self._files["train"]),),
                validation=(str(self._files["validation"]),),
                data_dir=str(self._work_dir / "data"),
            ),
        )

    def _compose(self, measurement: Measurement) -> ComposedModel:
        base = self._language_model(measurement.base)
        terms: list[LanguageModel | ValueNetwork] = []
        for term in measurement.terms:
            model = term.model
            if isinstance(model, Training) and model.method == "value":
                terms.append(load_value(self.train(model)))
            else:
                terms.append(self._language_model(model))
        maps: list[Path | None] = []
        if (method := measurement.map_method) is not None:
            texts = running_texts(self._items)
            for index, term in enumerate(terms):
                kind = method + ("-centred" if measurement.centred else "")
                file = self._work_dir / "maps" / f"{measurement.base}-{kind}-{index}.safetensors"
                family_map(base, term, texts, path=file, method=method, centred=measurement.centred)
                maps.append(file)
        strengths = [term.strength for term in measurement.terms]
        return compose(base, *terms, strengths=strengths, maps=maps)

    def _language_model(self, model: Base | Training) -> LanguageModel:
        folder = self.train(model) if isinstance(model, Training) else self._folder(model)
        return load_language_model(str(folder))

    def _folder(self, base: Base) -> Path:
        if base in ("S-continued", "L-continued"):
            return _continued(base[0], self._work_dir / "continued")
        if base == "XL":
            return self._xl
        return family_folder(cast(Any, base))


def _tuned(measurement: Measurement) -> list[Training]:
    """The fine-tuned models in a measurement."""
    models = [measurement.base, *(term.model for term in measurement.terms)]
    return [one for one in models if isinstance(one, Training) and one.method == "sft"]


def _settings_recorded(measurement: Measurement) -> bool:
    return all(
        read_reference(cast(Model, one.bases[0]), one.chosen_by) for one in _tuned(measurement)
    )


@functools.cache
def _continued(model: Any, work_dir: Path) -> Path:
    return continue_pretraining(model, work_dir=work_dir)
