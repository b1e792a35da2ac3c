"""A continually pre-trained base: `python -m ivl_jax.experiments.continued`.

In: the embedded model L, statements about people it has never heard of, and a part of what it was
trained on. Out: a model folder in `runs/`, not shipped, that knows the new facts. A value network
trained before these people were invented should let it answer questions about them.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import tyro

from ivl_jax.assets import family_folder
from ivl_jax.experiments.corpus import Corpus, load_corpus
from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.facts import Fact, build_facts, fact_questions
from ivl_jax.experiments.pretraining import Pace, Schedule, pretrain, write_model
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

NEW_FACTS_SEED = "ivl-facts-2"
NEW_PEOPLE = 64
# A third of the rates L was pre-trained with, and each new fact stated about 60 times, as the old.
SCHEDULE = Schedule(epochs=1.5, rows=16, learning_rate=1e-3, rest_rate=7e-4)
# One source file in 8 and all old facts keep what L knows alive.
_SOURCES_ONE_IN = 8


def new_facts() -> list[Fact]:
    """Facts about people whom no shipped model knows."""
    known = {fact.person for fact in build_facts()}
    return [
        fact
        for fact in build_facts(seed=NEW_FACTS_SEED, count=NEW_PEOPLE)
        if fact.person not in known
    ]


def new_items() -> list[Item]:
    """One question a new fact, in one of the two forms; none is for training."""
    return [
        Item(question.question, question.answer, "fact", question.person, "test")
        for question in {item.answer: item for item in fact_questions(new_facts())}.values()
    ]


def continued_corpus() -> Corpus:
    """The new statements, the old ones, and some of the sources."""
    corpus = load_corpus()
    sources = corpus.sources[::_SOURCES_ONE_IN]
    return Corpus(sources, corpus.held_out, (*corpus.facts, *new_facts()))


def continue_pretraining(out: Path, *, work_dir: Path) -> Path:
    """Trains L on, unless it has been done; an unfinished run is continued.

    Args:
        out: The model folder.
        work_dir: Checkpoints of the unfinished.

    Returns:
        `out`.
    """
    if (out / "manifest.json").exists():
        return out
    start = load_language_model(str(family_folder("L")))
    tokenizer: Any = start.tokenizer
    params, record = pretrain(
        "L, continued",
        start.arch,
        tokenizer,
        continued_corpus(),
        SCHEDULE,
        begin=lambda: jax.tree.map(lambda leaf: leaf.astype("float32"), start.params),
        work_dir=work_dir,
        seed=1,
        pace=Pace(checkpoint_every=50, log_every=20),
    )
    config = json.loads((family_folder("L") / "config.json").read_text(encoding="utf-8"))
    manifest = {
        "model": "L, continued",
        "command": "python -m ivl_jax.experiments.continued",
        "schedule": SCHEDULE._asdict(),
    } | record
    write_model(out, start.arch, config, params, tokenizer, manifest)
    return out


def main() -> None:
    """The command line."""
    form = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout, force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    tyro.cli(lambda: None, description=__doc__)
    folder = continue_pretraining(
        Path("runs/continued/L-continued"), work_dir=Path("runs/continued/checkpoints")
    )
    logger.info("%s: %s", folder, (folder / "manifest.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
