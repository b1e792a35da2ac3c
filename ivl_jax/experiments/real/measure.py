"""What the study of a real model measures: each composition once, on held-out questions.

In: the laboratory's models. Out: JSON records of NLL by kind of question, and of GSM8K's questions
answered right. A record is made again where what it is about has changed.
"""

from pathlib import Path
from typing import Any

from ivl_jax.checkpoint import load_value
from ivl_jax.checkpoint.value_metadata import METADATA_NAME
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.intervals import wilson_interval
from ivl_jax.experiments.demonstrations import items_hash, select
from ivl_jax.experiments.kept_results import kept_record, measure_once
from ivl_jax.experiments.measure import answers, family_map, response_nll, running_texts
from ivl_jax.experiments.real.items import of_kind
from ivl_jax.experiments.real.lab import RealLaboratory
from ivl_jax.experiments.real.subjects import SUBJECTS, Subject
from ivl_jax.rewards import is_right_number
from ivl_jax.weights.language_model import load_language_model

_ROWS = 8  # scored or decoded together


class Measurements:
    """Records of the subjects, in the laboratory's work directory."""

    def __init__(self, laboratory: RealLaboratory, folder: Path) -> None:
        """Say where records are.

        Args:
            laboratory: Has the models.
            folder: Of the records.
        """
        self._laboratory = laboratory
        self._folder = folder
        self._test = select(laboratory.items, "test")

    def possible(self, subject: Subject) -> bool:
        """Whether everything that a subject is composed of has been made."""
        return all(self._laboratory.finished(stage) for stage in SUBJECTS[subject].stages)

    def kept(self, subject: Subject) -> dict[str, Any] | None:
        """The record of a subject that was made with today's settings, or None."""
        return kept_record(self._file(subject), self._about(subject))

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Measure a subject whose parts have been made, unless already done.

        Args:
            subject: What to measure.

        Returns:
            `nll`, by kind of question nats per token of the right answers, their ends included;
            `questions`, by kind how many; and if it is measured on GSM8K, `answered`, how many of
            its questions it answers with text, of them `right` with the reference's number, and
            `interval`, the 95 % Wilson interval of their share.
        """
        name, about = SUBJECTS[subject].name, self._about(subject)
        return measure_once(name, self._file(subject), about, lambda: self._figures(subject))

    def _figures(self, subject: Subject) -> dict[str, Any]:
        model, budget = self._model(subject), self._laboratory.budget
        record: dict[str, Any] = {"nll": {}, "questions": {}}
        for kind in SUBJECTS[subject].kinds:
            asked = of_kind(self._test, kind)
            record["nll"][kind] = response_nll(model, asked, rows=_ROWS)
            record["questions"][kind] = len(asked)
        if "gsm8k" in SUBJECTS[subject].kinds:
            asked = of_kind(self._test, "gsm8k")[: budget.answered]
            texts = answers(model, asked, max_new_tokens=budget.answer_tokens, batch_size=4 * _ROWS)
            right = sum(
                is_right_number(text, item.answer) for text, item in zip(texts, asked, strict=True)
            )
            record |= {
                "answered": len(asked),
                "right": right,
                "interval": list(wilson_interval(right, len(asked))),
            }
        return record

    def _file(self, subject: Subject) -> Path:
        return self._folder / f"{subject}.json"

    def _about(self, subject: Subject) -> dict[str, str]:
        laboratory, stages = self._laboratory, SUBJECTS[subject].stages
        made = {f"{stage}_sha256": laboratory.key(stage) for stage in stages}
        budget = laboratory.budget
        return {
            "items_sha256": items_hash(self._test),
            "models": "trained" if laboratory.exports is None else "restored from exports",
            "target": laboratory.target_key,
            "answers": f"{budget.answered} of at most {budget.answer_tokens} tokens",
            **made,
        }

    def _model(self, subject: Subject) -> ComposedModel:
        laboratory, parts = self._laboratory, SUBJECTS[subject]
        base_folder = laboratory.target if parts.base is None else laboratory.output(parts.base)
        base = load_language_model(base_folder)
        added = []
        for stage in parts.added:
            folder = laboratory.output(stage)
            is_value = (folder / METADATA_NAME).exists()  # restored ones are plain models
            added.append(load_value(folder) if is_value else load_language_model(folder))
        if "family_value" not in parts.added:
            return compose(base, *added, strengths=parts.strengths)
        map_file = self._folder / f"map-{laboratory.key('family_value')}.safetensors"
        if not map_file.exists():
            map_file.parent.mkdir(parents=True, exist_ok=True)
            family_map(base, added[0], running_texts(laboratory.items), path=map_file)
        return compose(base, *added, maps=[map_file])
