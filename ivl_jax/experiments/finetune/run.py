"""One fine-tuning of a reference, with early stopping by validation NLL and by exact match.

In: a setting, the demonstrations. Out: the validation curve, and the model folders of the two best
steps. Models, batches, loss, optimizer and schedule are those of the training loop
(`ivl_jax.training`); the loop here adds what a reference needs beyond them: an adapter of a model
that is trained alone, frozen embeddings, pre-training statements in each batch, and held-out
answers.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.checkpoint import TrainCheckpointer
from ivl_jax.config import TrainConfig, config_to_mapping
from ivl_jax.data.batching import Batch
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.answer_scores import answer_rows, score_given
from ivl_jax.experiments.demonstrations import Item, items_hash, select, write_demonstrations
from ivl_jax.experiments.family.corpus import Corpus, Windows
from ivl_jax.experiments.family.facts import build_facts, new_facts
from ivl_jax.experiments.family.tokenizers import CONTEXT
from ivl_jax.experiments.finetune.settings import Kinds, Point, Setting, best_point
from ivl_jax.experiments.finetune.settings import criteria as criteria_of
from ivl_jax.experiments.held_out_figures import scored_figures
from ivl_jax.model.decoder import Params
from ivl_jax.model.lora import join, merge
from ivl_jax.model.projection import Lora
from ivl_jax.sharding import place_batch
from ivl_jax.training.models import choose_models
from ivl_jax.training.setup import Preparation, make_run_mesh, prepare, prepare_data
from ivl_jax.training.step import TrainState, split_micro_batches
from ivl_jax.weights.language_model import (
    LanguageModel,
    load_language_model,
    save_language_model,
)

logger = logging.getLogger(__name__)

_KIND_OF: dict[Kinds, tuple[str, ...]] = {
    "facts": ("fact",),
    "docstrings": ("docstring",),
    "both": ("fact", "docstring"),
}
_ROWS = 64  # scored together
EVALUATIONS = 20  # held-out evaluations of a run, at equal distances


def items_of(items: Sequence[Item], setting: Setting) -> list[Item]:
    """The demonstrations that a setting is trained and chosen on: all splits, its kinds only."""
    if setting.kinds == "all":
        return list(items)
    found = [item for item in items if item.kind in _KIND_OF[setting.kinds]]
    again = [item for item in found if item.kind == "fact" and item.split == "train"]
    return found + again * (setting.fact_repeats - 1)


def run_config(config: TrainConfig, setting: Setting, *, model: Path) -> TrainConfig:
    """The demo's config, turned into a setting's fine-tuning of a model; without paths of a run.

    Args:
        config: The demo's.
        setting: What to change.
        model: The folder of the model.

    Returns:
        The config.
    """
    return dataclasses.replace(
        config,
        method="sft",
        seed=setting.seed,
        base=dataclasses.replace(config.base, path=str(model)),
        penalty=dataclasses.replace(config.penalty, kind="none", weight=0.0),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=setting.learning_rate,
            weight_decay=setting.weight_decay,
        ),
        step=dataclasses.replace(config.step, epochs=setting.epochs, batch_size=setting.batch_size),
    )


def run_key(config: TrainConfig, setting: Setting, items: Sequence[Item], *, model: Path) -> str:
    """A hash of everything that determines a run: its key in the work directory.

    Args:
        config: From `run_config`.
        setting: The setting, for what the config cannot say.
        items: The demonstrations of all kinds.
        model: The folder of the model that is trained.

    Returns:
        16 hexadecimal digits, independent of where the files are.
    """
    said = config_to_mapping(
        dataclasses.replace(
            config,
            run_dir="",
            base=dataclasses.replace(config.base, path=""),
            value=dataclasses.replace(config.value, path=""),
            data=dataclasses.replace(config.data, train=(), validation=(), data_dir=""),
            logging=type(config.logging)(),
        )
    )
    weights = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        weights.update(file.read_bytes())
    effective = {
        "config": said,
        "setting": dataclasses.asdict(setting),
        "items": items_hash(items_of(items, setting)),
        "weights": weights.hexdigest(),
        "evaluations": EVALUATIONS,
    }
    text = json.dumps(effective, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class HeldOutAnswers:
    """Scores the answers of held-out items under changing parameters of one model."""

    def __init__(self, model: LanguageModel, items: Sequence[Item]) -> None:
        """Prepare the rows.

        Args:
            model: Its tokenizer and architecture count.
            items: Questions with their answers.
        """
        self._model = model
        self._items = items
        given = [item.given for item in items]
        self._rows, self._masks = answer_rows(compose(model), given)

    def __call__(self, params: Params) -> dict[str, float | None]:
        """Score every answer.

        Args:
            params: Of a model of the same architecture, layers unstacked.

        Returns:
            As `scored_figures`.
        """
        composed = compose(dataclasses.replace(self._model, params=params))
        scores = score_given(composed, self._rows, self._masks, batch_size=_ROWS)
        return scored_figures(self._items, scores)


class Fit(NamedTuple):
    """A finished run."""

    curve: list[Point]
    train_loss: list[float]
    """At the same steps: mean loss since the last of them, nats per token."""
    seconds: float
    """Over all starts."""


def fine_tune(
    config: TrainConfig,
    setting: Setting,
    items: Sequence[Item],
    *,
    run_dir: Path,
    data_dir: Path,
    on_point: Callable[[Point], object] = lambda point: None,
) -> Fit:
    """Fine-tune a model to the last step; a run that was killed resumes from its last evaluation.

    The model of the best step by each criterion is left in `run_dir`, as `best_CRITERION`.

    Args:
        config: From `run_config`.
        setting: What the config cannot say.
        items: The demonstrations of all kinds.
        run_dir: Of this run alone.
        data_dir: For demonstrations in the form that training reads; runs share it.
        on_point: Called after each held-out evaluation.

    Returns:
        The result.
    """
    started = time.monotonic()
    chosen = items_of(items, setting)
    files = write_demonstrations(run_dir / "demonstrations", chosen)
    config = dataclasses.replace(
        config,
        run_dir=str(run_dir),
        data=dataclasses.replace(
            config.data,
            train=(str(files["train"]),),
            validation=(str(files["validation"]),),
            data_dir=str(data_dir),
        ),
    )
    mesh = make_run_mesh(config)
    models = choose_models(config, mesh)
    lora = Lora(setting.rank, float(setting.rank), "all-linear") if setting.rank else None
    models = dataclasses.replace(models, lora=lora)
    data = prepare_data(config, models, mesh)
    prepared = prepare(config, models, data, mesh)
    start = load_language_model(config.base.path)
    held_out = HeldOutAnswers(start, select(chosen, "validation"))
    before = held_out(start.params)["docstring_nll"] if setting.kinds == "both" else None
    curve: list[Point] = []
    losses: list[float] = []
    seconds = 0.0
    with TrainCheckpointer(run_dir / "checkpoints", keep=1) as checkpoints:
        if checkpoints.latest_step() is not None:
            restored = checkpoints.restore(prepared.abstract_state)
            data.train.set_state(restored.data_state)
            curve = [Point(*point) for point in restored.run_metadata["curve"]]
            losses, seconds = (restored.run_metadata[name] for name in ("losses", "seconds"))
            begin = restored.state
            logger.info("resuming from step %d", restored.step)
        else:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # killed while it was saved
            begin = prepared.make_state()
        for state, loss in _train(prepared, setting, start, begin):
            params = _whole(state.params, prepared)
            figures = held_out(params)
            point = Point(
                int(state.step),
                _number(figures["nll"]),
                figures["exact_match"],
                figures["fact_nll"],
                figures["docstring_nll"],
                keeps_docstrings=before is None or _number(figures["docstring_nll"]) <= before,
            )
            curve.append(point)
            losses.append(loss)
            for criterion in criteria_of(setting.kinds):
                if best_point(curve, criterion) is point:
                    _save(start, params, run_dir / f"best_{criterion}")
            so_far = seconds + time.monotonic() - started
            checkpoints.save(
                state,
                data_state=data.train.get_state(),
                run_metadata={"curve": curve, "losses": losses, "seconds": so_far},
            )
            on_point(point)
    shutil.rmtree(run_dir / "checkpoints")
    return Fit(curve, losses, seconds + time.monotonic() - started)


def _save(start: LanguageModel, params: Params, folder: Path) -> None:
    tuned = dataclasses.replace(start, path=str(folder), params=params)
    save_language_model(folder, tuned, dtype=jnp.float32, overwrite=True)


def _train(
    prepared: Preparation, setting: Setting, start: LanguageModel, state: TrainState
) -> Iterator[tuple[TrainState, float]]:
    """The state at each evaluation, which the next step donates, and the mean loss before it."""
    total = prepared.data.total_steps
    points = {max(1, round(total * (at + 1) / EVALUATIONS)) for at in range(EVALUATIONS)}
    program = prepared.programs[0]
    kept = jax.device_get(state.params["embed_tokens"]) if setting.frozen_embeddings else None
    statements = None
    if setting.statement_rows:
        facts = [*build_facts(), *(new_facts() if setting.model == "L-continued" else ())]
        tokenizer: Any = start.tokenizer
        corpus = Corpus((), (), tuple(facts))
        statements = Windows(corpus, tokenizer, length=CONTEXT, seed=setting.seed)
    losses: list[Any] = []
    for step in range(int(state.step), total):
        batch = next(prepared.data.train)
        if statements is not None:
            rows = statements.batch(step, rows=setting.statement_rows)
            batch = with_statements(batch, rows)
        placed = place_batch(split_micro_batches(batch, 1), prepared.mesh, micro_batched=True)
        state, metrics = program.step(state, None, placed)
        losses.append(metrics["loss"])
        if kept is not None:
            old = jax.tree.map(lambda leaf: leaf.sharding, state.params["embed_tokens"])
            params = state.params | {"embed_tokens": jax.device_put(kept, old)}
            state = state._replace(params=params)
        if step + 1 in points:
            loss = float(np.mean(jax.device_get(losses)))
            losses.clear()
            yield state, loss


def with_statements(batch: Batch, windows: np.ndarray) -> Batch:
    """Add rows of running text, all of whose targets count, to a batch of demonstrations.

    Args:
        batch: Arrays [B T].
        windows: Token ids [R T + 1].

    Returns:
        Arrays [B + R T].
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    added = Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=np.ones(tokens.shape, bool),
        positions=positions,
        segment_ids=np.ones(tokens.shape, np.int32),
    )
    return jax.tree.map(lambda one, two: np.concatenate([one, two]), batch, added)


def _whole(params: Params, prepared: Preparation) -> Params:
    """The parameters of the model, an adapter merged into it."""
    lora, frozen = prepared.models.lora, prepared.frozen
    if lora is None or frozen is None:
        return params
    joined: Mapping[str, Any] = join(params, frozen)
    return merge(dict(joined), lora, dtype=jnp.float32)


def _number(found: float | None) -> float:
    assert found is not None, "there are held-out items"
    return found
