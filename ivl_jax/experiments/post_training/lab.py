"""Trains and measures what the post-training study compares, each once.

In: `Run`s and `Measurement`s. Out: their folders and JSON files in a work directory. Existing ones
are not made again unless their settings changed, and a training that was interrupted resumes.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivl_jax import post_training
from ivl_jax.assets import family_folder
from ivl_jax.checkpoint import load_value
from ivl_jax.config import TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.answer_pairs import write_pairs
from ivl_jax.experiments.answer_scores import score_answers
from ivl_jax.experiments.demonstrations import (
    Item,
    items_hash,
    select,
    some_of,
    write_demonstrations,
    write_questions,
)
from ivl_jax.experiments.family.facts import build_facts, questions_about_strangers
from ivl_jax.experiments.family.recall import recalled
from ivl_jax.experiments.kept_results import kept_record, measure_once, train_once
from ivl_jax.experiments.measure import answers, exact_match, family_map, running_texts
from ivl_jax.experiments.post_training.configs import (
    Inputs,
    Settings,
    config_of,
)
from ivl_jax.experiments.post_training.pair_figures import pair_figures
from ivl_jax.experiments.post_training.plan import (
    Measurement,
    Run,
    Split,
    best_rate,
    sweeps,
)
from ivl_jax.experiments.settings_key import family_weights, settings_key
from ivl_jax.experiments.value_as_model import write_value_as_model
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

_KEY = 10  # digits of a hash in a folder's name


class PostTrainingLaboratory:
    """Trains and measures on one set of demonstrations."""

    def __init__(self, work_dir: Path, items: list[Item], settings: Settings) -> None:
        """Write the questions to files.

        Args:
            work_dir: For all results.
            items: From `build_items`.
            settings: See there.
        """
        self._work_dir = work_dir.absolute()
        self._items = items
        self._settings = settings
        self._facts = [item for item in items if item.kind == "fact"]
        self._demonstrations: dict[int, Mapping[str, Path]] = {}
        self._questions: dict[str, Path] = {}
        # By runs with a learning rate: a chain of runs would hash each of its links many times.
        self._outputs: dict[Run, Path] = {}
        (self._work_dir / "inputs").mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            asked = select(self._facts, split)
            self._questions[split] = self._input(f"questions_{split}", asked, ".jsonl")
            write_questions(self._questions[split], asked)

    @property
    def measured_dir(self) -> Path:
        """Folder of the measurements' files."""
        return self._work_dir / "measured"

    def measure(self, measurement: Measurement) -> dict[str, Any]:
        """Measure a model on held-out questions, unless already done.

        Args:
            measurement: Which one; what it needs is trained first.

        Returns:
            `exact_match` (share of questions answered word for word), `nll` of the right answers
            and `kl`, KL(model ‖ base), both in nats per token of the right answers; after a run
            also `learning_rate`, and `pair_figures` of the held-out pairs; of a base
            `recall`, the share of the same facts whose statements it completes.

        Raises:
            InterruptedTrainingError: a training was stopped.
        """
        file, made_of, chosen = self._file_of(measurement)
        return measure_once(chosen.name, file, made_of, lambda: self._figures(chosen))

    def _figures(self, measurement: Measurement) -> dict[str, Any]:
        items = select(self._facts, measurement.split)
        decoder, scorer = self._models(measurement)
        texts = answers(decoder, items)
        scores = score_answers(scorer, [item.given for item in items])
        record = {
            "exact_match": exact_match(texts, items),
            "nll": scores.nll,
            "kl": scores.kl,
            "questions": len(items),
        }
        if measurement.run is None:
            asked = {item.answer for item in items}
            facts = [fact for fact in build_facts() if fact.statement() in asked]
            record["recall"] = float(recalled(scorer, facts).mean())
        else:
            record["learning_rate"] = self.config_of(measurement.run).optimizer.learning_rate
            record |= self._on_pairs(scorer, measurement.split, measurement.run.seed)
        return record

    def kept(self, measurement: Measurement) -> dict[str, Any] | None:
        """A measurement that was made with today's settings.

        Args:
            measurement: Which one; nothing is trained.

        Returns:
            The record of `measure`, or None.
        """
        needed = [] if measurement.run is None else sweeps(measurement.run)
        if any(self.kept(one) is None for one in needed):
            return None
        file, made_of, _ = self._file_of(measurement)
        return kept_record(file, made_of)

    def train(self, run: Run) -> Path:
        """Train, unless already done; an interrupted training resumes.

        Args:
            run: What to train; what it needs is trained first.

        Returns:
            The value folder, or the model folder of a model trained alone.

        Raises:
            InterruptedTrainingError: it was stopped.
        """
        run = self._with_rate(run)
        output = self._output(run)
        if output.exists():
            return output
        self._make_inputs(run)
        return train_once(
            run.name,
            output.parent,
            output,
            config=lambda: self.config_of(run),
            run=post_training.run,
        )

    def config_of(self, run: Run) -> TrainConfig:
        """The config of a run; what a choice of its learning rate needs is trained first.

        Args:
            run: What to train.

        Returns:
            Its config.
        """
        run = self._with_rate(run)
        config = self._config_without_folder(run)
        return dataclasses.replace(config, run_dir=str(self._output(run).parent))

    def _config_without_folder(self, run: Run) -> TrainConfig:
        start = None
        if run.start is not None:
            start = self._output(run.start)
            start = start if run.start.alone else start.with_name("exported")
        inputs = Inputs(
            data=self._data(run),
            data_dir=self._work_dir / "data",
            start=start,
            teacher=None if run.teacher is None else self._output(run.teacher),
        )
        return config_of(run, self._settings, inputs, run_dir=self._work_dir / "trained")

    def _with_rate(self, run: Run) -> Run:
        """A run whose learning rate has been chosen, on validation questions."""
        if not run.sweep:
            return run
        tried = {
            one.rate: self.measure(Measurement("L", one, "validation"))
            for one in run.sweep
            if one.rate is not None
        }
        return run._replace(rate=best_rate(run.kind, tried))

    def _output(self, run: Run) -> Path:
        """The folder that a run makes; its name holds a hash of the run's settings."""
        run = self._with_rate(run)
        if run not in self._outputs:
            key = settings_key(self._config_without_folder(run), work_dir=self._work_dir)
            folder = self._work_dir / "trained" / f"{run.name}-{key[:_KEY]}"
            self._outputs[run] = folder / ("model" if run.alone else "value")
        return self._outputs[run]

    def _file_of(self, measurement: Measurement) -> tuple[Path, dict[str, str], Measurement]:
        """A measurement's file, hashes of what it is about, and its run with a learning rate."""
        file = self.measured_dir / f"{measurement.name}.json"
        run, split = measurement.run, measurement.split
        made_of = [measurement.base, family_weights(measurement.base)]
        if run is None:
            made_of.append("recall")  # earlier measurements have that of all facts
        else:
            run = self._with_rate(run)
            made_of += [self._output(run).parent.name, self._pairs(split, run.seed).name]
        key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
        items = items_hash(select(self._facts, split))
        hashes = {"items_sha256": items, "settings_sha256": key}
        return file, hashes, measurement._replace(run=run)

    def _input(self, name: str, items: list[Item], suffix: str = "") -> Path:
        """A file or folder whose name holds a hash of its items."""
        return self._work_dir / "inputs" / f"{name}-{items_hash(items)[:_KEY]}{suffix}"

    def _data(self, run: Run) -> Mapping[str, Path]:
        """Split → file, which `_make_inputs` makes where it is made of a run's answers."""
        if run.kind == "sft":
            files = self._demonstrations_of(run.seed)
            return {split: files[split] for split in ("train", "validation")}
        if run.kind == "dpo":
            return {split: self._pairs(split, run.seed) for split in ("train", "validation")}
        if run.teacher is None:
            return self._questions
        name = self._output(run.teacher).parent.name
        more = "-and-strangers" if run.kind == "fold" else ""
        return {
            split: self._work_dir / "inputs" / f"answers_{split}{more}-{name}.jsonl"
            for split in self._asked(run)
        }

    def _asked(self, run: Run) -> Mapping[str, list[Item]]:
        """Split → what the teacher of a run is asked; its answers are the run's text."""
        asked = {split: select(self._facts, split) for split in ("train", "validation")}
        if run.kind == "fold":
            asked["train"] += [
                Item(one.question, one.answer, "fact", one.person, one.split)
                for one in questions_about_strangers()
            ]
        return asked

    def _demonstrations_of(self, seed: int) -> Mapping[str, Path]:
        """Split → file; each seed draws its own share of the training items."""
        if seed not in self._demonstrations:
            few = some_of(self._items, self._settings.share, seed=seed)
            folder = self._input("demonstrations", few)
            self._demonstrations[seed] = write_demonstrations(folder, few)
        return self._demonstrations[seed]

    def _pairs(self, split: str, seed: int) -> Path:
        """Pairs of a split whose wrong answers S gave with its value network of this seed."""
        name = self._output(Run("sft", "S", seed=seed)).parent.name
        samples = self._settings.samples
        return self._work_dir / "inputs" / f"pairs_{split}-{samples}-of-{name}.jsonl"

    def _make_inputs(self, run: Run) -> None:
        """Train what a run starts from and learns from, and let it give its answers."""
        if run.start is not None:
            found = self.train(run.start)
            exported = found.with_name("exported")
            if not run.start.alone and not exported.exists():
                write_value_as_model(found, exported)
        if run.kind == "dpo":
            self._make_pairs("train", run.seed)
            self._make_pairs("validation", run.seed)
        if run.teacher is None:
            return
        found = self.train(run.teacher)
        files = self._data(run)
        for split, asked in self._asked(run).items():
            if (file := files[split]).exists():
                continue
            logger.info("%s answers %d questions", run.teacher.name, len(asked))
            teacher = Measurement(run.model, run.teacher)
            texts = answers(self._models(teacher)[0], asked)
            given = zip(asked, texts, strict=True)
            write_questions(file, [item._replace(answer=text) for item, text in given if text])

    def _make_pairs(self, split: Split | str, seed: int) -> Path:
        file = self._pairs(split, seed)
        if not file.exists():
            value = self.train(Run("sft", "S", seed=seed))
            asked = [item for item in self._facts if item.split == split]
            logger.info("sampling wrong answers to %d questions", len(asked))
            write_pairs(file, asked, value, samples=self._settings.samples, seed=seed)
        return file

    def _on_pairs(self, scorer: ComposedModel, split: Split, seed: int) -> dict[str, float]:
        lines = self._make_pairs(split, seed).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        given = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        scores = score_answers(scorer, given)
        persons = {item.question: item.group for item in self._facts}
        log_prob, base = scores.log_prob.reshape(-1, 2), scores.base_log_prob.reshape(-1, 2)
        return pair_figures(pairs, persons, log_prob, base)

    def _models(self, measurement: Measurement) -> tuple[ComposedModel, ComposedModel]:
        """The model that answers, and the same one over its base for scores."""
        base, run = load_language_model(str(family_folder(measurement.base))), measurement.run
        if run is None:
            return (model := compose(base)), model
        found = self.train(run)
        if run.alone:
            # base + tuned − base: the tuned model, compared with the base that it was once.
            tuned = load_language_model(str(found))
            return compose(tuned), compose(base, tuned, base, strengths=[1.0, -1.0])
        value = load_value(found)
        path = self._work_dir / "maps" / f"{measurement.base}-{found.parent.name}.safetensors"
        file = family_map(base, value, running_texts(self._items), path=path)
        model = compose(base, value, maps=[file])
        return model, model
