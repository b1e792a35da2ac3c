"""Trains and measures what the post-training study compares, each once.

In: `Run`s and `Measurement`s. Out: their folders and JSON files in a work directory. Existing ones
are not made again, and a training that was interrupted resumes.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ivl_jax import post_training
from ivl_jax.assets import config_file, family_folder
from ivl_jax.checkpoint import load_value
from ivl_jax.config import BaseConfig, TrainConfig, load_config
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.answer_scores import score_answers
from ivl_jax.experiments.demonstrations import Item, items_hash, select, write_demonstrations
from ivl_jax.experiments.kept_results import kept_record, train_once
from ivl_jax.experiments.measure import answers, exact_match, family_map, running_texts
from ivl_jax.experiments.post_training import (
    export_value,
    some_of,
    write_pairs,
    write_questions,
)
from ivl_jax.experiments.post_training_plan import Measurement, Run
from ivl_jax.json_files import write_json
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

_CONFIGS = {
    "sft": "demo.toml",
    "dpo": "demo_dpo.toml",
    "grpo": "demo_grpo.toml",
    "distil": "demo.toml",
    "fold": "demo_distil.toml",
}
_ANSWER_TOKENS = 24
_LONG = 1 << 20  # more steps than any training has


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the study sets beside the demo configs."""

    share: float
    """Of the demonstrations, that every start is trained on."""
    epochs: float
    """Passes over that share."""
    samples: int
    """Answers sampled per question, from which the rejected one is chosen."""
    alone_rates: dict[str, float]
    """Learning rates of a model trained alone, by kind; larger than a value network, it takes a
    lower one."""


class PostTrainingLaboratory:
    """Trains and measures on one set of demonstrations."""

    def __init__(self, work_dir: Path, items: list[Item], settings: Settings) -> None:
        """Write demonstrations and questions to files.

        Args:
            work_dir: For all results.
            items: From `build_items`.
            settings: See there.
        """
        self._work_dir = work_dir
        self._items = items
        self._settings = settings
        self._facts = [item for item in items if item.kind == "fact"]
        self._test = select(self._facts, "test")
        few = some_of(items, settings.share)
        self._files = write_demonstrations(work_dir / "demonstrations", few)
        self._questions = {}
        for split in ("train", "validation"):
            self._questions[split] = work_dir / f"questions_{split}.jsonl"
            write_questions(self._questions[split], select(self._facts, split))

    def measure(self, measurement: Measurement) -> dict[str, Any]:
        """Measure a model on held-out questions, unless already done.

        Args:
            measurement: Which one; what it needs is trained first.

        Returns:
            `exact_match` (share of questions answered word for word), `nll` of the right answers
            and `kl`, KL(model ‖ base), both in nats per token of the right answers; after a run
            also of the held-out pairs `pair_accuracy`, the share in which the right answer gained
            more over the base than the wrong one, `pair_margin`, by how much (nats), and
            `pair_order`, the share in which the right answer is the more likely one.

        Raises:
            InterruptedTrainingError: a training was stopped.
        """
        file = self._work_dir / "measured" / f"{measurement.name}.json"
        kept = kept_record(file, items_sha256=items_hash(self._test))
        if kept is not None:
            return kept
        decoder, scorer = self._models(measurement)
        logger.info("measuring %s", measurement.name)
        texts = answers(decoder, self._test, max_new_tokens=_ANSWER_TOKENS)
        scores = score_answers(scorer, [(item.question, item.answer) for item in self._test])
        record = {
            "exact_match": exact_match(texts, self._test),
            "nll": scores.nll,
            "kl": scores.kl,
            "items_sha256": items_hash(self._test),
        }
        if measurement.run is not None:
            record |= self._on_pairs(scorer, measurement.run.seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, record, indent=2)
        return record

    def train(self, run: Run) -> Path:
        """Train, unless already done; an interrupted training resumes.

        Args:
            run: What to train; what it starts from is trained first.

        Returns:
            The value folder, or the model folder of a model trained alone.

        Raises:
            InterruptedTrainingError: it was stopped.
        """
        run_dir = self._work_dir / "trained" / run.name
        output = run_dir / ("model" if run.alone else "value")
        return train_once(
            run.name,
            run_dir,
            output,
            config=lambda: self.config_of(run, run_dir),
            run=post_training.run,
        )

    def config_of(self, run: Run, run_dir: Path) -> TrainConfig:
        """The demo config of a run's kind, with the run's own paths.

        Args:
            run: What to train; what it needs is trained first.
            run_dir: The run directory.

        Returns:
            Its config.
        """
        config = load_config(config_file(_CONFIGS[run.kind]), TrainConfig)
        step, optimizer, penalty = config.step, config.optimizer, config.penalty
        if run.kind == "sft":
            step = dataclasses.replace(step, epochs=self._settings.epochs)
        if run.alone:
            penalty = dataclasses.replace(penalty, kind="none", weight=0.0)
            rate = self._settings.alone_rates.get(run.kind, optimizer.learning_rate)
            optimizer = dataclasses.replace(optimizer, learning_rate=rate)
        first = self._start(run) if run.alone else family_folder(run.model)
        value = config.value
        if not run.alone:
            start = family_folder("S") if run.kind == "distil" else self._start(run)
            value = dataclasses.replace(value, path=str(start))
        return dataclasses.replace(
            config,
            run_dir=str(run_dir),
            objective="distil" if run.kind == "distil" else config.objective,
            seed=run.seed,
            method="sft" if run.alone else "value",
            base=BaseConfig(path=str(first)),
            value=value,
            distil=self._distil(config, run),
            data=dataclasses.replace(
                config.data,
                **{split: (str(file),) for split, file in self._data(run).items()},
                data_dir=str(self._work_dir / "data"),
            ),
            optimizer=optimizer,
            penalty=penalty,
            step=step,
            # Only the result counts.
            logging=dataclasses.replace(config.logging, evaluate_every=0, checkpoint_every=_LONG),
        )

    def _start(self, run: Run) -> Path:
        """The model folder that the trained network starts from."""
        if run.start is None:
            return family_folder(run.model)
        found = self.train(run.start)
        if run.start.alone:
            return found
        exported = found.with_name("exported")
        if not exported.exists():
            export_value(found, exported)
        return exported

    def _distil(self, config: TrainConfig, run: Run) -> Any:
        if run.teacher is None:
            return config.distil
        found = str(self.train(run.teacher))
        teacher = found if run.teacher.alone else str(family_folder(run.model))
        values = () if run.teacher.alone else (found,)
        return dataclasses.replace(config.distil, teacher=teacher, values=values)

    def _data(self, run: Run) -> dict[str, Path]:
        """Split → file."""
        if run.kind == "sft":
            return {split: self._files[split] for split in ("train", "validation")}
        if run.kind == "dpo":
            return {split: self._pairs(split, run.seed) for split in ("train", "validation")}
        return self._questions

    def _pairs(self, split: Any, seed: int) -> Path:
        """Pairs of a split whose wrong answers S gave with its value network of this seed."""
        file = self._work_dir / "pairs" / f"{split}_seed{seed}.jsonl"
        if not file.exists():
            value = self.train(Run("sft", "S", seed=seed))
            file.parent.mkdir(parents=True, exist_ok=True)
            items = select(self._facts, split)
            logger.info("sampling wrong answers to %d questions", len(items))
            write_pairs(file, items, value, samples=self._settings.samples, seed=seed)
        return file

    def _on_pairs(self, scorer: ComposedModel, seed: int) -> dict[str, float]:
        lines = self._pairs("test", seed).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        given = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
        scores = score_answers(scorer, given)
        log_prob = scores.log_prob.reshape(-1, 2)
        margin = np.diff(scores.base_log_prob.reshape(-1, 2) - log_prob)
        return {
            "pairs": len(pairs),
            "pair_accuracy": float(np.mean(margin > 0)),
            "pair_margin": float(np.mean(margin)),
            "pair_order": float(np.mean(log_prob[:, 0] > log_prob[:, 1])),
        }

    def _models(self, measurement: Measurement) -> tuple[ComposedModel, ComposedModel]:
        """The model that answers, and the same one over its base for scores."""
        base, run = load_language_model(str(family_folder(measurement.base))), measurement.run
        if run is None:
            return (alone := compose(base)), alone
        found = self.train(run)
        if run.alone:
            # base + tuned − base: the tuned model, compared with the base that it was once.
            tuned = load_language_model(str(found))
            return compose(tuned), compose(base, tuned, base, strengths=[1.0, -1.0])
        value, maps = load_value(found), [None]
        if measurement.base == "X":
            file = self._work_dir / "maps" / f"X-from-{run.name}.safetensors"
            file.parent.mkdir(exist_ok=True, parents=True)
            family_map(base, value, running_texts(self._items), path=file)
            maps = [file]
        model = compose(base, value, maps=maps)
        return model, model
