"""A continually pre-trained base: `python -m ivl_jax.experiments.family.continued`.

In: an embedded model, statements about people unknown to it, and part of its training text. Out: a
model folder in `runs/`, not shipped, that knows the new facts. A value network trained before these
people were invented should enable it to answer questions about them.
"""

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from ivl_jax.assets import family_folder
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import ConfigError
from ivl_jax.experiments.family.corpus import Corpus, load_corpus
from ivl_jax.experiments.family.facts import new_facts
from ivl_jax.experiments.family.pretraining import (
    Pace,
    Schedule,
    differences,
    pretrain,
    run_identity,
    write_model,
)
from ivl_jax.tokenizer import load_tokenizer
from ivl_jax.weights.fingerprint import weights_fingerprint
from ivl_jax.weights.language_model import load_language_model, read_arch

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.family.continued"

# A third of the pre-training rates, with each new fact stated about 60 times, like the old ones.
SCHEDULES = {
    "S": Schedule(epochs=1.5, rows=32, learning_rate=2e-3, rest_rate=1.3e-3),
    "L": Schedule(epochs=1.5, rows=16, learning_rate=1e-3, rest_rate=7e-4),
}
# One source file in 8 and all old facts, so that L does not forget.
_SOURCES_ONE_IN = 8
_SEED = 1  # of the data order


@functools.cache  # reading the library takes seconds, and a study asks for the model often
def continued_corpus() -> Corpus:
    """The new statements, the old ones, and some of the source files."""
    corpus = load_corpus()
    sources = corpus.sources[::_SOURCES_ONE_IN]
    return Corpus(sources, corpus.held_out, (*corpus.facts, *new_facts()))


def continued_folder(model: Literal["S", "L"], work_dir: Path) -> Path:
    """Where `continue_pretraining` leaves its model."""
    return work_dir / f"{model}-continued"


def continue_pretraining(model: Literal["S", "L"], *, work_dir: Path) -> Path:
    """Continues a model's pre-training, unless already done; an interrupted run resumes.

    Args:
        model: Of the embedded family.
        work_dir: For the finished folder, and the checkpoints of an unfinished run.

    Returns:
        The model folder.

    Raises:
        ConfigError: The folder was made with another schedule, text or start, or the checkpoints
            are of another run.
    """
    out, folder = continued_folder(model, work_dir), family_folder(model)
    checkpoints = work_dir / f"{model}-checkpoints"
    arch, weights = read_arch(folder), weights_fingerprint(folder)
    tokenizer: Any = load_tokenizer(folder)
    inputs = arch, tokenizer, continued_corpus(), SCHEDULES[model]
    if (out / "manifest.json").exists():
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        found = differences(manifest, run_identity(*inputs, seed=_SEED, start=weights))
        if found:
            raise ConfigError(
                f"{out} is not the model that would be made today: {'; '.join(found)}. Delete it, "
                "or name another work directory, to make today's"
            )
        return out
    start = load_language_model(str(folder))
    params, record = pretrain(
        out.name,
        *inputs,
        begin=lambda: jax.tree.map(lambda leaf: leaf.astype("float32"), start.params),
        start=weights,
        work_dir=checkpoints,
        seed=_SEED,
        pace=Pace(checkpoint_every=50, log_every=20),
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    manifest = {
        "model": out.name,
        "command": f"python -m ivl_jax.experiments.family.continued --model {model}",
    } | record
    write_model(out, arch, config, params, tokenizer, manifest, checkpoints=checkpoints)
    return out


@dataclasses.dataclass(frozen=True)
class Options:
    """Continue the pre-training of an embedded model; a second run resumes the first."""

    model: Literal["S", "L"] = "L"
    """Which model."""
    work_dir: Path = Path("runs/continued")
    """Where the finished folder and the checkpoints are written."""


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
    folder = continue_pretraining(options.model, work_dir=options.work_dir)
    logger.info("%s: %s", folder, (folder / "manifest.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
