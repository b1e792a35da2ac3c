"""Pre-trains the embedded family: `python -m ivl_jax.experiments.pretrain_family --model all`.

In: this Python's standard library and the invented facts. Out: the folders S, L and X with
weights, config, tokenizer and a manifest of how they were made. Run again, it continues where it
stopped; the data order is a pure function of (seed, step), so a resumed run equals one that never
stopped.
"""

import dataclasses
import functools
import json
import logging
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerFast

from ivl_jax.experiments.corpus import Corpus, Windows, held_out_windows, load_corpus
from ivl_jax.experiments.facts import statement_documents
from ivl_jax.experiments.family_tokenizers import (
    CONTEXT,
    save_wrapped_tokenizer,
    train_byte_tokenizer,
    train_word_tokenizer,
    wrap_tokenizer,
)
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, build_decoder, forward, init_params
from ivl_jax.weights.hf_checkpoint import save_params

logger = logging.getLogger(__name__)

ModelName = Literal["S", "L", "X"]


class Recipe(NamedTuple):
    """One model's shape and training."""

    entries: int  # of the vocabulary
    width: int  # D
    mlp_width: int  # F
    layers: int
    head_dim: int  # H; 4 heads everywhere, each with its own keys and values
    epochs: float
    rows: int  # windows of 256 tokens a step
    learning_rate: float  # of the matrices inside the layers (Muon)
    rest_rate: float  # of everything else (AdamW)


RECIPES: dict[str, Recipe] = {
    # S stops while it knows about half of the facts: what the larger models know more can be seen.
    "S": Recipe(2048, 128, 384, 2, 32, epochs=1.5, rows=32, learning_rate=6e-3, rest_rate=4e-3),
    "L": Recipe(2048, 352, 960, 4, 64, epochs=1.5, rows=16, learning_rate=3e-3, rest_rate=2e-3),
    "X": Recipe(3072, 192, 576, 3, 48, epochs=1.5, rows=32, learning_rate=6e-3, rest_rate=4e-3),
}
_WARMUP_STEPS = 50
# The rate stays at its peak, then falls to zero over this share: more epochs extend the flat part.
_DECAY_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Options:
    """Pre-train the embedded family of small models; a second run continues the first."""

    model: Literal["S", "L", "X", "all"] = "all"
    """Which model; `all`: one after the other."""
    epochs: float = 0.0
    """Passes over the text; 0: the model's own number."""
    out: Path = Path(__file__).parents[1] / "assets" / "family"
    """Where the finished folders go."""
    work_dir: Path = Path("runs/pretrain")
    """Checkpoints and tokenizers of the unfinished."""
    seed: int = 0
    """Of initial weights and data order."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between console lines."""


class PretrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def architecture(recipe: Recipe, *, bos: int, eos: int) -> dict[str, Any]:
    """The `config.json` of a recipe: a Llama with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.entries,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.mlp_width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }


def make_optimizer(recipe: Recipe, *, steps: int) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embedding and norms; one schedule shape.

    Muon's updates are scaled to AdamW's usual size (root mean square 0.2). Source: Liu et al.,
    Muon is Scalable for LLM Training, arXiv 2502.16982.
    """
    decay = round(_DECAY_SHARE * steps)

    def schedule(peak: float) -> optax.Schedule:
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
            schedule(recipe.learning_rate),
            weight_decay=0.05,
            adam_learning_rate=schedule(recipe.rest_rate),
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
        # optax mixes dtypes and ranks by design; ours stay strict where a test asks for it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        return PretrainState(state.step + 1, params, opt_state), loss

    return train_step


class Probe:
    """Held-out figures: NLL of files never trained on, and the share of facts that are known."""

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
    """Rows of eos + statement, and which of their targets are the value's tokens."""
    facts = corpus.facts
    rows = np.full((len(facts), 32), tokenizer.eos_token_id, np.int32)
    is_value = np.zeros((len(facts), 31), bool)
    for index, fact in enumerate(facts):
        encoded = tokenizer.backend_tokenizer.encode(fact.statement(), add_special_tokens=False)
        rows[index, 1 : 1 + len(encoded.ids)] = encoded.ids
        start = fact.statement().rindex(fact.value)
        for at, (_, end) in enumerate(encoded.offsets):
            is_value[index, at] = start < end <= start + len(fact.value)
    return rows, is_value


def make_tokenizer(name: str, corpus: Corpus, *, work_dir: Path) -> PreTrainedTokenizerFast:
    """The model's tokenizer, trained once and kept: S and L share one, X has its own."""
    folder = work_dir / ("tokenizer_word" if name == "X" else "tokenizer_byte")
    if not (folder / "tokenizer.json").exists():
        texts = [file.text for file in corpus.sources]
        texts += statement_documents(list(corpus.facts), seed=0, epoch=0)
        if name == "X":
            trained = train_word_tokenizer(texts, entries=RECIPES[name].entries)
            tokenizer = wrap_tokenizer(trained, bos="<s>", eos="</s>")
        else:
            trained = train_byte_tokenizer(texts, entries=RECIPES[name].entries)
            tokenizer = wrap_tokenizer(trained, bos="<|endoftext|>", eos="<|endoftext|>")
        save_wrapped_tokenizer(tokenizer, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def pretrain(name: str, corpus: Corpus, options: Options) -> dict[str, Any]:
    """Trains one model to its last step and writes its folder.

    Args:
        name: Key of `RECIPES`.
        corpus: The text.
        options: Command-line options.

    Returns:
        The manifest.
    """
    recipe = RECIPES[name]
    tokenizer = make_tokenizer(name, corpus, work_dir=options.work_dir)
    ids: Any = tokenizer  # its declared type of a token id is a union of everything
    config = architecture(recipe, bos=ids.bos_token_id, eos=ids.eos_token_id)
    arch = ArchConfig.from_hf(config)
    graphdef = build_decoder(arch)
    windows = Windows(corpus, tokenizer, length=CONTEXT, seed=options.seed)
    steps_an_epoch = windows.count // recipe.rows
    epochs = options.epochs or recipe.epochs
    steps = round(epochs * steps_an_epoch)
    optimizer = make_optimizer(recipe, steps=steps)
    probe = Probe(graphdef, corpus, tokenizer)

    @jax.jit
    def begin() -> PretrainState:
        params = init_params(arch, jax.random.key(options.seed))
        return PretrainState(jnp.int32(0), params, optimizer.init(params))

    state = begin()
    folder = (options.work_dir / name).absolute()
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as checkpoints:
        seconds = 0.0
        if (latest := checkpoints.latest_step()) is not None:
            restored = checkpoints.restore(
                latest,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state), progress=ocp.args.JsonRestore()
                ),
            )
            state, seconds = restored["state"], restored["progress"]["seconds"]
            logger.info("%s: continues at step %d", name, latest)
        train_step = make_train_step(graphdef, optimizer)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        logger.info(
            "%s: %.2f M parameters, %d steps of %d tokens; %d source, %d statement tokens an epoch",
            name,
            parameters / 1e6,
            steps,
            recipe.rows * CONTEXT,
            windows.source_tokens,
            windows.statement_tokens,
        )
        first, started, losses = int(state.step), time.monotonic(), []
        for step in range(first, steps):
            state, loss = train_step(state, windows.batch(step, rows=recipe.rows))
            losses.append(loss)
            done, last = step + 1, step + 1 == steps
            if done % options.log_every == 0 or last:
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
                    rate * recipe.rows * CONTEXT,
                    (steps - done) / rate / 60,
                )
            if done % options.checkpoint_every == 0 or last:
                total = seconds + time.monotonic() - started
                checkpoints.save(
                    done,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        progress=ocp.args.JsonSave({"seconds": total}),
                    ),
                )
                logger.info("%s step %d · %s", name, done, probe(state.params))
        seconds += time.monotonic() - started
    manifest = {
        "model": name,
        "parameters": parameters,
        "command": f"python -m ivl_jax.experiments.pretrain_family --model {name}",
        "recipe": recipe._asdict() | {"epochs": epochs},
        "steps": steps,
        "tokens_seen": steps * recipe.rows * CONTEXT,
        "seconds": round(seconds),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "corpus_sha256": corpus.fingerprint,
    } | probe(state.params)
    write_model(options.out / name, arch, config, state.params, tokenizer, manifest)
    return manifest


def write_model(
    folder: Path,
    arch: ArchConfig,
    config: dict[str, Any],
    params: Params,
    tokenizer: PreTrainedTokenizerFast,
    manifest: dict[str, Any],
) -> None:
    """Replaces the model's folder by a finished one: bf16 weights, configs, tokenizer, manifest."""
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


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    # Libraries may have installed a handler of their own by now: ours replaces it.
    form = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout, force=True)
    # Orbax tells about every file it touches.
    logging.getLogger("absl").setLevel(logging.WARNING)
    corpus = load_corpus()
    for name in RECIPES if options.model == "all" else (options.model,):
        logger.info("%s: %s", name, pretrain(name, corpus, options))


if __name__ == "__main__":
    main()
