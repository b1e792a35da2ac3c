"""Runs the matrix's trainings and measurements, each once, to model folders and JSON files.

In: `Training`s and `Measurement`s. Out: their folders and files in a work directory. Existing ones
are not made again, so an interrupted run resumes.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Bool

from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import ValueNetwork, load_value
from ivl_jax.config import ConfigError, TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.answer_scores import answer_rows, score_given
from ivl_jax.experiments.demonstrations import (
    Item,
    items_hash,
    new_items,
    select,
    write_demonstrations,
)
from ivl_jax.experiments.family.continued import (
    continue_pretraining,
    continued_folder,
)
from ivl_jax.experiments.family.facts import new_facts
from ivl_jax.experiments.family.recall import recalled
from ivl_jax.experiments.finetune.references import Reference, read_reference
from ivl_jax.experiments.finetune.settings import Model, Setting
from ivl_jax.experiments.finetune.sweep import PROGRAM, Sweep
from ivl_jax.experiments.held_out_figures import (
    answered,
    facts_of_test,
    figures_on,
    is_fact,
    scored_figures,
)
from ivl_jax.experiments.kept_results import kept_record, measure_once, train_once
from ivl_jax.experiments.measure import (
    FACT_TOKENS,
    family_map,
    running_texts,
    share_answered,
)
from ivl_jax.experiments.pretrain_family import XL_FOLDER
from ivl_jax.experiments.settings_key import hash_of, settings_key
from ivl_jax.experiments.transfer.bases import recipe_key
from ivl_jax.experiments.transfer.matrix import Base, Measurement, Training
from ivl_jax.experiments.value_as_model import write_value_as_model
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import LanguageModel, load_language_model

_MADE: tuple[Base, ...] = ("S-continued", "L-continued", "XL")
_KEY = 10  # digits of a hash in a folder's name
_LONG = 1 << 20  # more steps than any training has


class Laboratory:
    """Trains and measures on one set of demonstrations."""

    def __init__(
        self,
        work_dir: Path,
        config: TrainConfig,
        items: list[Item],
        *,
        references: Path | None = None,
        xl: Path = XL_FOLDER,
    ) -> None:
        """Write the demonstrations to files.

        Args:
            work_dir: For all results.
            config: The demo's; every training starts from it.
            items: From `build_items`.
            references: Work directory of the sweep of references, whose models are used where they
                are there; None: its own.
            xl: The folder of XL, which is not shipped.
        """
        self._work_dir, self._xl = work_dir, xl
        self._references = references or work_dir / "references"
        # Only the result counts: intermediate evaluations and saves take a third of the time.
        quiet = dataclasses.replace(config.logging, evaluate_every=0, checkpoint_every=_LONG)
        self._config = dataclasses.replace(config, logging=quiet)
        self._items = items
        # The folder's name tells what is in it, for the keys of trainings.
        folder = work_dir / "demonstrations" / items_hash(items)[:_KEY]
        self._files = write_demonstrations(folder, items)
        self._sweep = Sweep(self._references, config, items, xl=xl)
        self._test = select(items, "test")
        self._test_sha256 = items_hash(self._test)
        self._validation = select(items, "validation")

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
            As `figures_on`; with the prefix `validation_` the NLL by kind and the share of facts
            answered of the validation split, for choices; on a base that knows the new facts
            `new_exact_match`, and of that base alone `new_recall`. With a value network also
            `known_match` and `unknown_match`, the share of facts answered among those that S
            recalls and among the others. Beside them what was measured: `items_sha256` and
            `settings_sha256`.

        Raises:
            InterruptedTrainingError: a training was stopped.
        """
        name = measurement.name
        file = self.measured_dir / f"{name}.json"
        return measure_once(name, file, self._key(measurement), lambda: self._figures(measurement))

    def lacks(self, measurement: Measurement) -> str:
        """What a measurement needs that has to be made by another command; empty: nothing."""
        if measurement.base == "XL" and not (self._xl / "config.json").exists():
            return (
                f"{self._xl} is not there: python -m ivl_jax.experiments.pretrain_family --model XL"
            )
        for one in _tuned(measurement):
            if not _recorded(one):
                (model,) = one.bases
                return f"{model} has no recorded fine-tuning: {PROGRAM} --models {model}"
        return ""

    def kept(self, measurement: Measurement) -> dict[str, Any] | None:
        """A measurement that was made with today's items and settings; nothing is trained."""
        if not all(_recorded(one) for one in _tuned(measurement)):
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
        name = f"{training.name}-{self.training_key(training)[:_KEY]}"
        run_dir = self._work_dir / "trained" / name
        return train_once(
            training.name,
            run_dir,
            run_dir / "value",
            config=lambda: self.config_of(training, run_dir),
            run=run,
        )

    def start_of(self, training: Training) -> Path:
        """A trained value network as a model folder, from which another training can start.

        Args:
            training: Of a value network.

        Returns:
            The model folder.
        """
        run_dir = self.train(training).parent
        start = run_dir.with_name(f"{run_dir.name}-exported")
        if not start.exists():
            write_value_as_model(run_dir / "value", start)
        return start

    def training_key(self, training: Training) -> str:
        """A hash of everything that a trained model depends on.

        Args:
            training: What is trained.
        """
        if training.method == "sft":
            recorded = _reference_of(training)
            setting = dataclasses.replace(recorded.setting, seed=training.seed)
            return hash_of([str(setting), training.chosen_by, recorded.tests.get(training.seed)])
        folders = {base: self.folder(base, make=False) for base in _MADE}
        models = {folder: f"{base} {recipe_key(base)}" for base, folder in folders.items()}
        config = self.config_of(training, self._work_dir / "run", make=False)
        return settings_key(config, work_dir=self._work_dir, models=models)

    def setting_of(self, training: Training) -> Setting:
        """The recorded setting of a fine-tuned model, with the training's seed.

        Args:
            training: Of the method `sft`.

        Returns:
            The setting.

        Raises:
            ConfigError: No setting has been chosen for this model.
        """
        return dataclasses.replace(_reference_of(training).setting, seed=training.seed)

    def _key(self, measurement: Measurement) -> dict[str, str]:
        """Hashes of what a kept measurement has to be about."""
        models = [measurement.base, *(term.model for term in measurement.terms)]
        made_of = [
            [
                self.training_key(one) if isinstance(one, Training) else recipe_key(one)
                for one in models
            ],
            measurement.name,
            items_hash(self._validation),
            items_hash(new_items()) if measurement.base == "L-continued" else "",
            FACT_TOKENS,
        ]
        return {"items_sha256": self._test_sha256, "settings_sha256": hash_of(made_of)}

    def _figures(self, measurement: Measurement) -> dict[str, Any]:
        base, alone = measurement.base, not measurement.terms
        if isinstance(base, Training) and alone:
            return self._reference_figures(base)
        model = self._compose(measurement)
        right = answered(model, self._test)
        record = figures_on(model, self._test, right) | self._validation_figures(model)
        if base == "L-continued":
            record["new_exact_match"] = share_answered(model, new_items())
            if alone:
                record["new_recall"] = float(recalled(model, new_facts()).mean())
        if len(measurement.terms) == 1:
            record |= self._by_knowledge_of_s(right[is_fact(self._test)])
        return record

    def _validation_figures(self, model: ComposedModel) -> dict[str, Any]:
        given = answer_rows(model, [item.given for item in self._validation])
        found = scored_figures(self._validation, score_given(model, *given))
        return {f"validation_{name}": figure for name, figure in found.items()}

    @functools.cached_property
    def _known_to_s(self) -> Bool[np.ndarray, " F"]:
        return recalled(compose(self._language_model("S")), facts_of_test())

    def _by_knowledge_of_s(self, right: Bool[np.ndarray, " F"]) -> dict[str, float]:
        """Facts answered among those that S recalls, and among those that it does not."""
        known = self._known_to_s
        return {
            "known_match": float(right[known].mean()),
            "unknown_match": float(right[~known].mean()),
        }

    def _reference_figures(self, training: Training) -> dict[str, Any]:
        """The recorded figures of a fine-tuned model; made again if they are of other items."""
        (model,) = training.bases
        recorded = read_reference(
            cast(Model, model), training.chosen_by, items_sha256=self._test_sha256
        )
        if recorded is not None and training.seed in recorded.tests:
            figures = recorded.tests[training.seed]
        else:
            figures = self._sweep.reference_test(self.setting_of(training), training.chosen_by)
        return {name: each for name, each in figures.items() if name not in ("seed", "step")}

    def config_of(self, training: Training, run_dir: Path, *, make: bool = True) -> TrainConfig:
        """The demo's config with the training's changes.

        Args:
            training: Of a value network.
            run_dir: The run directory.
            make: Whether bases that are not shipped are made; else they are only named.

        Returns:
            Its config.
        """
        first, *others = (
            dataclasses.replace(self._config.base, path=str(self.folder(base, make=make)))
            for base in training.bases
        )
        config = self._config
        kind, weight = training.penalty
        starts = training.init == "base" or training.connection == "linear"
        value_path = "" if starts else str(self.folder(training.init_model))
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
        folder = self.train(model) if isinstance(model, Training) else self.folder(model)
        return load_language_model(str(folder))

    def folder(self, base: Base, *, make: bool = True) -> Path:
        """The model folder of a base.

        Args:
            base: Which one.
            make: Whether one that is not shipped is made; else it is only named.

        Returns:
            The folder.
        """
        if base in ("S-continued", "L-continued"):
            here = self._references / "continued"
            small: Any = base[0]
            return _continued(small, here) if make else continued_folder(small, here)
        if base == "XL":
            return self._xl
        return family_folder(cast(Any, base))


def _tuned(measurement: Measurement) -> list[Training]:
    """The fine-tuned models in a measurement."""
    models = [measurement.base, *(term.model for term in measurement.terms)]
    return [one for one in models if isinstance(one, Training) and one.method == "sft"]


def _reference_of(training: Training) -> Reference:
    """What is recorded of a fine-tuned model.

    Raises:
        ConfigError: No setting has been chosen for it.
    """
    (model,) = training.bases
    reference = read_reference(cast(Model, model), training.chosen_by)
    if reference is None:
        raise ConfigError(
            f"{model} fine-tuned, chosen by {training.chosen_by}: no setting is recorded: "
            f"run {PROGRAM} --models {model}"
        )
    return reference


def _recorded(training: Training) -> bool:
    """Whether the setting of a fine-tuned model has been chosen."""
    return read_reference(cast(Model, training.bases[0]), training.chosen_by) is not None


@functools.cache
def _continued(model: Any, work_dir: Path) -> Path:
    return continue_pretraining(model, work_dir=work_dir)
