"""Pre-training on the corpus: one model, from random or given weights to a finished folder.

In: a recipe, text, a tokenizer. Out: a Hugging Face folder with weights, config, tokenizer and a
manifest of how it was made. An interrupted run resumes, and no other one from its checkpoints; the
data order is a pure function of (seed, step), so a resumed run equals an uninterrupted one.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerFast

from ivl_jax.config import ConfigError
from ivl_jax.experiments.family.corpus import Corpus, Windows, held_out_windows
from ivl_jax.experiments.family.recall import statement_row
from ivl_jax.experiments.family.tokenizers import CONTEXT, save_wrapped_tokenizer
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, build_decoder, forward
from ivl_jax.weights.hf_saving import save_params

logger = logging.getLogger(__name__)

_WARMUP_STEPS = 50
# The rate stays at its peak, then decays to zero over this share of the steps.
_DECAY_SHARE = 0.3


class PretrainState(NamedTuple):
    """The content of a checkpoint."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


class Schedule(NamedTuple):
    """Batch size, learning rates and length of a training."""

    epochs: float
    rows: int  # windows of 256 tokens per step
    learning_rate: float  # of the matrices inside the layers (Muon)
    rest_rate: float  # of everything else (AdamW)


class Pace(NamedTuple):
    """When a run logs and saves, in steps."""

    checkpoint_every: int = 100
    log_every: int = 20


def make_optimizer(schedule: Schedule, *, steps: int) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embedding and norms; one schedule shape.

    Muon's updates are scaled to AdamW's usual size (root mean square 0.2). Source: Liu et al.,
    Muon is Scalable for LLM Training, arXiv 2502.16982.
    """
    decay = round(_DECAY_SHARE * steps)

    def rate(peak: float) -> optax.Schedule:
        flat = optax.constant_schedule(peak)
        parts = [optax.linear_schedule(0.0, peak, _WARMUP_STEPS), flat]
        boundaries = [_WARMUP_STEPS, steps - decay]
        return optax.join_schedules([*parts, optax.linear_schedule(peak, 0.0, decay)], boundaries)

    def matrices(params: Any) -> Any:
        spec = optax.contrib.MuonDimensionNumbers()

        def choose(path, leaf):
            return spec if leaf.ndim == 2 and path[0].key == "layers" else None

        return jax.tree_util.tree_map_with_path(choose, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rate(schedule.learning_rate),
            weight_decay=0.05,
            adam_learning_rate=rate(schedule.rest_rate),
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def token_losses(
    graphdef: nnx.GraphDef, params: Params, windows: Int[Array, "B W"]
) -> Float[Array, "B T"]:
    """Cross-entropy of each next token of windows of W = T + 1 ids, nats."""
    tokens, targets = windows[:, :-1], windows[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = forward(graphdef, params, tokens, positions=positions)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation):
    """The jitted step: (state, windows [B, T+1]) -> (state, mean loss); the state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: PretrainState, windows: Array) -> tuple[PretrainState, Array]:
        def mean_loss(params: Params) -> Array:
            return token_losses(graphdef, params, windows).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(state.params)
        # optax mixes dtypes and ranks by design; our own code stays strict in tests.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        return PretrainState(state.step + 1, params, opt_state), loss

    return train_step


class Probe:
    """Held-out figures: NLL of held-out files, and the share of facts that are known."""

    def __init__(
        self, graphdef: nnx.GraphDef, corpus: Corpus, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self._text = held_out_windows(corpus, tokenizer, length=CONTEXT, rows=64)
        self._facts, self._is_value = _fact_rows(corpus, tokenizer)
        self._losses = jax.jit(functools.partial(token_losses, graphdef))

        def right(params: Params, rows: Array) -> Array:
            positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
            logits = forward(graphdef, params, rows, positions=positions)
            return logits[:, :-1].argmax(-1) == rows[:, 1:]

        self._right = jax.jit(right)

    def __call__(self, params: Params) -> dict[str, float]:
        """`held_out_nll`, nats per token; `facts_known`, share of statements completed greedily."""
        losses = [self._losses(params, rows).mean() for rows in np.array_split(self._text, 4)]
        known = [
            np.asarray(self._right(params, rows)) | ~is_value
            for rows, is_value in zip(
                np.array_split(self._facts, 4), np.array_split(self._is_value, 4), strict=True
            )
        ]
        return {
            "held_out_nll": float(np.mean(losses)),
            "facts_known": float(np.concatenate(known).all(axis=1).mean()),
        }


def _fact_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Rows of eos + statement, and a mask of the targets that are the fact's value."""
    facts = corpus.facts
    rows = np.full((len(facts), 32), tokenizer.eos_token_id, np.int32)
    is_value = np.zeros((len(facts), 31), bool)
    for index, fact in enumerate(facts):
        statement = statement_row(tokenizer, fact)
        rows[index, : len(statement.token_ids)] = statement.token_ids
        is_value[index, : len(statement.is_value)] = statement.is_value
    return rows, is_value


def run_identity(
    arch: ArchConfig,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    schedule: Schedule,
    *,
    seed: int,
    start: str,
) -> dict[str, Any]:
    """What a training's result depends on: two runs of which it is the same are one.

    Args:
        arch: As for `pretrain`, like the others.
        tokenizer: Its tokenizer.
        corpus: The text.
        schedule: Batch size, learning rates and length.
        seed: Of the data order.
        start: What the parameters of step 0 are.

    Returns:
        JSON values by name: settings as they are, text and tokenizer by their SHA-256.
    """
    text = tokenizer.backend_tokenizer.to_str()
    identity = {
        "schedule": schedule._asdict(),
        "seed": seed,
        "start": start,
        "corpus_sha256": corpus.fingerprint,
        "tokenizer_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "arch": dataclasses.asdict(arch),
    }
    return json.loads(json.dumps(identity))


def differences(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """What a recorded run has otherwise.

    Args:
        recorded: Of a manifest or a checkpoint; what it does not name does not differ.
        identity: From `run_identity`.

    Returns:
        One text per entry, with both values.

    >>> differences({"seed": 0, "schedule": {"rows": 4}}, {"seed": 0, "schedule": {"rows": 8}})
    ['schedule.rows: 4 there, 8 now']
    """
    found = []
    for name, now in identity.items():
        there = recorded.get(name, now)
        if isinstance(now, dict) and isinstance(there, dict):
            found += [f"{name}.{each}" for each in differences(there, now)]
        elif there != now:
            found.append(f"{name}: {there} there, {now} now")
    return found


def pretrain(
    name: str,
    arch: ArchConfig,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    schedule: Schedule,
    *,
    begin: Callable[[], Params],
    start: str,
    work_dir: Path,
    seed: int,
    pace: Pace,
) -> tuple[Params, dict[str, Any]]:
    """Trains one model to its last step.

    Args:
        name: Its name in messages.
        arch: Its architecture.
        tokenizer: Its tokenizer.
        corpus: The text.
        schedule: Batch size, learning rates and length.
        begin: Makes the parameters of step 0; runs under jit.
        start: What they are beside the seed: `random`, or the fingerprint of given weights.
        work_dir: Its checkpoints; an unfinished run resumes from them.
        seed: Of the data order.
        pace: When it logs and saves.

    Returns:
        The parameters, and for the manifest `run_identity` and the held-out figures.

    Raises:
        ConfigError: The checkpoints are of another run.
    """
    identity = run_identity(arch, tokenizer, corpus, schedule, seed=seed, start=start)
    graphdef = build_decoder(arch)
    windows = Windows(corpus, tokenizer, length=CONTEXT, seed=seed)
    steps = round(schedule.epochs * (windows.count // schedule.rows))
    optimizer = make_optimizer(schedule, steps=steps)
    probe = Probe(graphdef, corpus, tokenizer)

    @jax.jit
    def begin_state() -> PretrainState:
        params = begin()
        return PretrainState(jnp.int32(0), params, optimizer.init(params))

    state = begin_state()
    with ocp.CheckpointManager(
        work_dir.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as checkpoints:
        seconds = 0.0
        if (latest := checkpoints.latest_step()) is not None:
            progress = checkpoints.restore(
                latest, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
            )["progress"]
            _check_resumes(name, work_dir, progress, identity)
            restored = checkpoints.restore(
                latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))
            )
            state, seconds = restored["state"], progress["seconds"]
            logger.info("%s: resuming from step %d", name, latest)
        train_step = make_train_step(graphdef, optimizer)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        logger.info(
            "%s: %.2f M parameters, %d steps of %d tokens; epoch: %d source, %d statement tokens",
            name,
            parameters / 1e6,
            steps,
            schedule.rows * CONTEXT,
            windows.source_tokens,
            windows.statement_tokens,
        )
        first, started, losses = int(state.step), time.monotonic(), []
        for step in range(first, steps):
            state, loss = train_step(state, windows.batch(step, rows=schedule.rows))
            losses.append(loss)
            done, last = step + 1, step + 1 == steps
            if done % pace.log_every == 0 or last:
                mean = float(np.mean(losses))
                losses.clear()
                elapsed = time.monotonic() - started
                rate = (done - first) / elapsed
                logger.info(
                    "%s step %d/%d · loss %.4f · %.0f tokens/s · ETA %.1f min",
                    name,
                    done,
                    steps,
                    mean,
                    rate * schedule.rows * CONTEXT,
                    (steps - done) / rate / 60,
                )
            if done % pace.checkpoint_every == 0 or last:
                total = seconds + time.monotonic() - started
                checkpoints.save(
                    done,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        progress=ocp.args.JsonSave({"seconds": total, "run": identity}),
                    ),
                )
                logger.info("%s step %d · %s", name, done, probe(state.params))
        seconds += time.monotonic() - started
    record = {
        "parameters": parameters,
        "steps": steps,
        "tokens_seen": steps * schedule.rows * CONTEXT,
        "seconds": round(seconds),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    return state.params, identity | record | probe(state.params)


def _check_resumes(
    name: str, work_dir: Path, progress: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    if "run" not in progress:
        problem = "do not tell of which run they are: an earlier version wrote them"
    elif found := differences(progress["run"], identity):
        problem = "are of another run: " + "; ".join(found)
    else:
        return
    raise ConfigError(
        f"{name}: {work_dir} has checkpoints that {problem}. Delete the folder to begin anew, or "
        "resume that run with its own options"
    )


def write_model(
    folder: Path,
    arch: ArchConfig,
    config: dict[str, Any],
    params: Params,
    tokenizer: PreTrainedTokenizerFast,
    manifest: dict[str, Any],
    *,
    checkpoints: Path,
) -> None:
    """Replaces the model's folder by the finished one, and then deletes the run's checkpoints.

    Args:
        folder: The model's: weights, config, tokenizer, manifest.
        arch: Its architecture.
        config: Its `config.json`, of which the token ids are taken.
        params: Its parameters.
        tokenizer: Its tokenizer.
        manifest: How it was made.
        checkpoints: The `work_dir` of the run.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_params(unfinished, arch, params, dtype=jnp.bfloat16)
    save_wrapped_tokenizer(tokenizer, unfinished)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    written = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
    for name, record in (
        ("config.json", written | token_ids),
        ("generation_config.json", token_ids),
        ("manifest.json", manifest),
    ):
        (unfinished / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    shutil.rmtree(checkpoints)
