"""Pre-trains the embedded family: `python -m ivl_jax.experiments.pretrain_family --model all`.

In: this Python's standard library and the invented facts. Out: the folders S, L and X with
weights, config, tokenizer and a manifest of how they were made; with `--model XL` a larger target,
which is not shipped. A second run resumes an interrupted one, and keeps what the first finished.
"""

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
from transformers import PreTrainedTokenizerFast

from ivl_jax.assets import family_folder
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.experiments.family.corpus import Corpus, load_corpus
from ivl_jax.experiments.family.facts import statement_documents
from ivl_jax.experiments.family.pretraining import (
    Pace,
    Schedule,
    pretrain,
    run_identity,
    write_model,
)
from ivl_jax.experiments.family.tokenizers import (
    CONTEXT,
    save_wrapped_tokenizer,
    train_byte_tokenizer,
    train_word_tokenizer,
    wrap_tokenizer,
)
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import init_params

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.pretrain_family"


class Recipe(NamedTuple):
    """One model's shape and training."""

    entries: int  # of the vocabulary
    width: int  # D
    mlp_width: int  # F
    layers: int
    head_dim: int  # H; 4 heads everywhere, each with its own keys and values
    epochs: float
    rows: int  # windows of 256 tokens per step
    learning_rate: float  # of the matrices inside the layers (Muon)
    rest_rate: float  # of everything else (AdamW)


RECIPES: dict[str, Recipe] = {
    # S stops when it knows about half of the facts, so that larger models visibly know more.
    "S": Recipe(2048, 128, 384, 2, 32, epochs=1.5, rows=32, learning_rate=6e-3, rest_rate=4e-3),
    "L": Recipe(2048, 352, 960, 4, 64, epochs=1.5, rows=16, learning_rate=3e-3, rest_rate=2e-3),
    "X": Recipe(3072, 192, 576, 3, 48, epochs=1.5, rows=32, learning_rate=6e-3, rest_rate=4e-3),
    "XL": Recipe(2048, 672, 1824, 5, 96, epochs=1.0, rows=16, learning_rate=2e-3, rest_rate=1.3e-3),
}
_SHIPPED = ("S", "L", "X")
XL_FOLDER = Path("runs/family/XL")
_START = "random"


@dataclasses.dataclass(frozen=True)
class Options:
    """Pre-train the embedded family of small models; a second run resumes the first."""

    model: Literal["S", "L", "X", "XL", "all"] = "all"
    """Which model; `all`: the three that are shipped, one after the other."""
    epochs: float = 0.0
    """Passes over the text; 0: the number in the model's recipe."""
    out: Path | None = None
    """Where the finished folders are written; by default those that are shipped inside the package,
    and XL in runs/family."""
    work_dir: Path = Path("runs/pretrain")
    """Checkpoints and tokenizers of unfinished models."""
    seed: int = 0
    """Of initial weights and data order."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between console lines."""


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


def make_tokenizer(name: str, corpus: Corpus, *, work_dir: Path) -> PreTrainedTokenizerFast:
    """The model's tokenizer, trained once: S and L share one, X has its own.

    XL has that of the shipped L, so that value networks of the shipped S fit it.
    """
    if name == "XL":
        return PreTrainedTokenizerFast.from_pretrained(family_folder("L"))
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


def make_model(name: str, corpus: Corpus, options: Options) -> dict[str, Any]:
    """Trains one model of the family and writes its folder, unless this very run has written it.

    Args:
        name: Key of `RECIPES`.
        corpus: The text.
        options: Command-line options.

    Returns:
        The manifest.

    Raises:
        ConfigError: The work directory has checkpoints of another run.
    """
    recipe = RECIPES[name]
    epochs = options.epochs or recipe.epochs
    tokenizer = make_tokenizer(name, corpus, work_dir=options.work_dir)
    ids: Any = tokenizer  # its declared type for token ids is a broad union
    config = architecture(recipe, bos=ids.bos_token_id, eos=ids.eos_token_id)
    arch = ArchConfig.from_hf(config)
    schedule = Schedule(epochs, recipe.rows, recipe.learning_rate, recipe.rest_rate)
    folder = XL_FOLDER if name == "XL" else family_folder(cast(Any, name))
    if options.out is not None:
        folder = options.out / name
    identity = run_identity(arch, tokenizer, corpus, schedule, seed=options.seed, start=_START)
    if (kept := _finished(folder, identity)) is not None:
        logger.info("%s: %s is the result of this run already; delete it to repeat", name, folder)
        return kept
    checkpoints = options.work_dir / name
    params, record = pretrain(
        name,
        arch,
        tokenizer,
        corpus,
        schedule,
        begin=functools.partial(init_params, arch, jax.random.key(options.seed)),
        start=_START,
        work_dir=checkpoints,
        seed=options.seed,
        pace=Pace(options.checkpoint_every, options.log_every),
    )
    manifest = {
        "model": name,
        "command": f"python -m ivl_jax.experiments.pretrain_family --model {name}",
        "recipe": recipe._asdict() | {"epochs": epochs},
    } | record
    write_model(folder, arch, config, params, tokenizer, manifest, checkpoints=checkpoints)
    return manifest


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that was made by a run with this identity."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return manifest if identity.items() <= manifest.items() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return long_run_command(_PROGRAM, _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM)
    log_to_stdout(times=True)
    corpus = load_corpus()
    for name in _SHIPPED if options.model == "all" else (options.model,):
        logger.info("%s: %s", name, make_model(name, corpus, options))


if __name__ == "__main__":
    sys.exit(main())
