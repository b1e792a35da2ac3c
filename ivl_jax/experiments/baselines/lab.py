"""Trains and measures what the study of baselines compares, each once.

In: `Row`s. Out: JSON files in a work directory, and the trained networks. Existing ones are not
made again; a training that was interrupted resumes. Each method is a composition, or a few lines
of arithmetic on parameters.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivl_jax.checkpoint import ValueNetwork, load_value
from ivl_jax.config import PenaltyConfig, StrengthPolicy, TrainConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.experiments.baselines.parameter_arithmetic import (
    add,
    average,
    diff_vector,
    scale_by_depth,
)
from ivl_jax.experiments.baselines.plan import (
    EDITED_STRENGTHS,
    FIRST_LAYER,
    PER_SEED,
    PROXY,
    SEEDS,
    TARGET_ROWS,
    Method,
    Row,
    Setting,
    settings_of,
)
from ivl_jax.experiments.changed_config import with_options
from ivl_jax.experiments.demonstrations import (
    Item,
    items_hash,
    new_items,
    select,
    target_rows,
    write_questions,
)
from ivl_jax.experiments.kept_results import kept_record, measure_once, train_once
from ivl_jax.experiments.measure import (
    FACT_TOKENS,
    answers,
    exact_match,
    family_map,
    response_nll,
    running_texts,
    share_answered,
)
from ivl_jax.experiments.settings_key import hash_of
from ivl_jax.experiments.transfer.bases import recipe_key
from ivl_jax.experiments.transfer.lab import Laboratory
from ivl_jax.experiments.transfer.matrix import Base, Training, fine_tuned, recipe
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import LanguageModel, load_language_model

logger = logging.getLogger(__name__)

_EDIT = {"learning_rate": 3e-4, "epochs": 5.0}
"""S on the target rows; not swept."""
_FORGET = {"learning_rate": 1e-3, "epochs": 10.0}
"""A value network on the people to forget; not swept."""


class Chosen(NamedTuple):
    """A model, and the setting that was chosen for it."""

    model: ComposedModel
    setting: str


class BaselinesLaboratory:
    """Trains and measures on one set of demonstrations."""

    def __init__(
        self,
        work_dir: Path,
        matrix: Laboratory,
        items: list[Item],
    ) -> None:
        """Choose the rows that settings are chosen on.

        Args:
            work_dir: For all results.
            matrix: Trains what the matrix has too, on the same items.
            items: From `build_items`.
        """
        self._work_dir, self._matrix, self._items = work_dir, matrix, items
        self._test = select(items, "test")
        self._facts = [item for item in self._test if item.kind == "fact"]
        self._rows = target_rows(items, TARGET_ROWS)

    @property
    def measured_dir(self) -> Path:
        """Folder of the measurements' files."""
        return self._work_dir / "baselines"

    def measure(self, row: Row) -> dict[str, Any]:
        """Measure a model on the test split, unless already done.

        Args:
            row: Which one; what it needs is trained first.

        Returns:
            `setting`, what was chosen on the target rows, `nll` (nats per answer token) and
            `exact_match`; on L-continued also `new_exact_match`; of `unlearned` instead the two
            figures of the people to forget and of the others, and the NLL of docstrings.

        Raises:
            InterruptedTrainingError: a training was stopped.
        """
        key = self._key(row)
        return measure_once(row.name, self._file(row), key, lambda: self._figures(row))

    def kept(self, row: Row) -> dict[str, Any] | None:
        """A measurement that was made with today's items and settings; nothing is trained."""
        return kept_record(self._file(row), self._key(row))

    def _figures(self, row: Row) -> dict[str, Any]:
        chosen = self._make(row)
        texts = answers(chosen.model, self._facts)
        record: dict[str, Any] = {"setting": chosen.setting}
        if row.method == "unlearned":
            record |= self._forgetting(chosen.model, texts)
        else:
            record["nll"] = response_nll(chosen.model, self._test)
            record["exact_match"] = exact_match(texts, self._facts)
        if row.target == "L-continued":
            record["new_exact_match"] = share_answered(chosen.model, new_items())
        return record

    def _file(self, row: Row) -> Path:
        return self.measured_dir / f"{row.name}.json"

    def _key(self, row: Row) -> dict[str, str]:
        """Hashes of what a row is made of."""
        own: dict[Method, Any] = {
            "edited": (EDITED_STRENGTHS, _EDIT),
            "lines": FIRST_LAYER,
            "unlearned": _FORGET,
        }
        made_of = [
            row.name,
            settings_of(row.method),
            own.get(row.method),
            items_hash(self._rows),
            [self._matrix.training_key(one) for one in trainings_of(row)],
            recipe_key(row.target),
            FACT_TOKENS,
        ]
        return {
            "items_sha256": items_hash(self._test),
            "settings_sha256": hash_of(made_of),
        }

    def _make(self, row: Row) -> Chosen:
        """The model of a row, with the setting that is best on the target rows."""
        base = self._base(row.target)
        if row.method in PROXY:
            return self._proxy(base, row)
        if row.method in PER_SEED:
            return self._calibrated(base, row)
        makers: dict[str, Callable[[LanguageModel, Row], Chosen]] = {
            "soup": self._soup,
            "ensemble": self._ensemble,
            "edited": self._edited,
            "unlearned": self._unlearned,
            "diff": self._diff,
            "diff_for_facts": self._diff,
            "lines": self._lines,
        }
        return makers[row.method](base, row)

    def _calibrated(self, base: LanguageModel, row: Row) -> Chosen:
        value = self._value(row.seed)
        path = self._work_dir / "maps" / f"{row.target}-baselines-{row.seed}.safetensors"
        file = family_map(base, value, running_texts(self._items), path=path)
        settings = settings_of(row.method)
        model = compose(base, value, maps=[file])
        if any(setting.temperature != 1 for setting in settings):
            model = compose(base, value, base, maps=[file, None])
        return self._best([under(model, setting) for setting in settings])

    def _proxy(self, base: LanguageModel, row: Row) -> Chosen:
        """Base + α (S fine-tuned − S), over T."""
        (training,) = trainings_of(row)
        tuned, small = load_language_model(str(self._matrix.train(training))), self._base("S")
        path = self._work_dir / "maps" / f"{row.target}-S.safetensors"
        file = family_map(base, small, running_texts(self._items), path=path)
        model = compose(base, tuned, small, base, maps=[file, file, None])

        def at(setting: Setting) -> Chosen:
            alpha, rest = setting.strengths
            strengths = (alpha, -alpha, rest)
            return Chosen(dataclasses.replace(model, strengths=strengths), setting.sentence)

        return self._best([at(setting) for setting in settings_of(row.method)])

    def _soup(self, base: LanguageModel, row: Row) -> Chosen:
        del row
        values = [self._value(seed) for seed in SEEDS]
        params = average([value.params for value in values])
        return Chosen(compose(base, dataclasses.replace(values[0], params=params)), "")

    def _ensemble(self, base: LanguageModel, row: Row) -> Chosen:
        del row
        values = [self._value(seed) for seed in SEEDS]
        return Chosen(compose(base, *values, strengths=1 / len(values)), "")

    def _edited(self, base: LanguageModel, row: Row) -> Chosen:
        del row
        small = self._base("S")
        edited = load_language_model(str(self._train_edited()))
        models = [
            Chosen(compose(base, edited, small, strengths=(a, -a)), f"α = {a:g}")
            for a in EDITED_STRENGTHS
        ]
        return self._best(models, self._rows[1::2])

    def _unlearned(self, base: LanguageModel, row: Row) -> Chosen:
        value, forget = self._value(row.seed), load_value(self._train_forgetting(row.seed))
        assert row.strength is not None, "rows of unlearning have one"
        model = compose(base, value, forget, strengths=(1 + row.strength, -row.strength))
        return Chosen(model, f"−{row.strength:g}")

    def _diff(self, base: LanguageModel, row: Row) -> Chosen:
        return Chosen(compose(self._with_diff(base, row, 1.0)), "")

    def _lines(self, base: LanguageModel, row: Row) -> Chosen:
        models = [
            Chosen(compose(self._with_diff(base, row, first)), f"first layer × {first:g}")
            for first in FIRST_LAYER
        ]
        return self._best(models)

    def _with_diff(self, base: LanguageModel, row: Row, first: float) -> LanguageModel:
        (training,) = trainings_of(row)
        tuned = load_language_model(str(self._matrix.train(training)))
        change = diff_vector(tuned.params, self._base("L").params)
        params = add(base.params, scale_by_depth(change, first=first))
        return dataclasses.replace(base, params=params)

    def _best(self, tried: Sequence[Chosen], rows: Sequence[Item] = ()) -> Chosen:
        """The one with the lowest NLL on the target rows; without a choice nothing is scored."""
        if len(tried) == 1:
            return tried[0]
        rows = rows or self._rows
        scored = [(response_nll(one.model, rows), one) for one in tried]
        for nll, one in scored:
            logger.info("on %d target rows: %s: %.3f", len(rows), one.setting, nll)
        return min(scored, key=lambda pair: pair[0])[1]

    def _forgetting(self, model: ComposedModel, texts: Sequence[str]) -> dict[str, float]:
        gone = set(to_forget(self._facts))
        parts = {"forgotten": gone, "retained": set(self._facts) - gone}
        found = {}
        for name, part in parts.items():
            pairs = [(t, i) for t, i in zip(texts, self._facts, strict=True) if i in part]
            items = [item for _, item in pairs]
            found[f"{name}_match"] = exact_match([text for text, _ in pairs], items)
            found[f"{name}_nll"] = response_nll(model, items)
        docstrings = [item for item in self._test if item.kind == "docstring"]
        return found | {"docstring_nll": response_nll(model, docstrings)}

    def _base(self, name: Base) -> LanguageModel:
        return load_language_model(str(self._matrix.folder(name)))

    def _value(self, seed: int) -> ValueNetwork:
        return load_value(self._matrix.train(recipe(seed)))

    def _train_edited(self) -> Path:
        config = dataclasses.replace(
            self._few("edited_S", recipe(0), self._rows[::2], **_EDIT),
            method="sft",
            penalty=PenaltyConfig(kind="none", weight=0.0),
        )
        run_dir = Path(config.run_dir)
        return train_once("S edited", run_dir, run_dir / "model", config=lambda: config, run=run)

    def _train_forgetting(self, seed: int) -> Path:
        """A value network that continues from that of a seed, on the people to forget."""
        start = self._matrix.start_of(recipe(seed))
        name = f"forgetting_seed{seed}"
        config = self._few(name, recipe(seed), to_forget(self._facts), **_FORGET)
        config = with_options(config, {"value": {"path": str(start)}})
        run_dir = Path(config.run_dir)
        return train_once(name, run_dir, run_dir / "value", config=lambda: config, run=run)

    def _few(
        self,
        name: str,
        training: Training,
        items: Sequence[Item],
        *,
        learning_rate: float,
        epochs: float,
    ) -> TrainConfig:
        """A training's config on a few items; its folder's name tells what it is made of."""
        content = items_hash(list(items))
        made_of = [self._matrix.training_key(training), content, learning_rate, epochs]
        run_dir = self._work_dir / "trained" / f"{name}-{hash_of(made_of)[:10]}"
        config = self._matrix.config_of(training, run_dir)
        file = self._work_dir / "inputs" / f"{name}-{content[:10]}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_questions(file, items)
        tables = {
            "data": {"train": (str(file),)},
            "optimizer": {"learning_rate": learning_rate},
            "step": {"epochs": epochs},
        }
        return with_options(config, tables)


def trainings_of(row: Row) -> list[Training]:
    """What a row's model is made of, in their own training.

    Args:
        row: Of the report.

    Returns:
        One training, or the three of a soup.
    """
    if row.method in ("diff", "lines"):
        return [fine_tuned("L")]
    if row.method == "diff_for_facts":
        return [fine_tuned("L", chosen_by="exact_match")]
    if row.method in PROXY:
        return [fine_tuned("S", row.seed, chosen_by=PROXY[row.method])]
    if row.method in ("soup", "ensemble"):
        return [recipe(seed) for seed in SEEDS]
    return [recipe(row.seed)]


def under(model: ComposedModel, setting: Setting) -> Chosen:
    """A base and one value network at a setting.

    Args:
        model: Composed of these two and, for a temperature, of the base once more.
        setting: α, temperature and policy.

    Returns:
        The model whose logits are (z + α z_value) / T, and the setting in words.
    """
    policy = StrengthPolicy(setting.policy, setting.scale)
    strengths = setting.strengths[: len(model.strengths)]
    changed = dataclasses.replace(model, strengths=strengths, policy=policy)
    return Chosen(changed, setting.sentence)


def to_forget(facts: Sequence[Item]) -> list[Item]:
    """The facts about every other person."""
    people = sorted({item.group for item in facts}, key=_hash)
    gone = set(people[::2])
    return [item for item in facts if item.group in gone]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
