"""What configs/demo_dpo, demo_grpo and demo_distil start from, on the embedded family.

`python -m ivl_jax.experiments.demo_post_training`. Out: in `runs/demo_post_training` a value
network of S that was trained on a tenth of the demo's demonstrations, the questions about the
invented facts, and for each of them the right answer beside a wrong one that S and this value
network gave.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ivl_jax.assets import config_file, family_folder
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import ConfigError, TrainConfig, load_config
from ivl_jax.config.files import config_to_toml
from ivl_jax.experiments.answer_pairs import write_pairs
from ivl_jax.experiments.demonstrations import (
    build_items,
    select,
    some_of,
    write_demonstrations,
    write_questions,
)
from ivl_jax.experiments.kept_results import train_once
from ivl_jax.experiments.value_as_model import write_value_as_model
from ivl_jax.json_files import read_json_object, write_json
from ivl_jax.training.loop import run

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.demo_post_training"
_OPTIONS = "options.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a value network on a part of the demonstrations, and sample wrong answers from it."""

    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """The training run's settings."""
    run_dir: Path = Path("runs/demo_post_training")
    """Where everything is written; what is there is not made again."""
    share: float = 0.1
    """Share of the training demonstrations that the value network sees."""
    epochs: float = 30.0
    """Passes over that share: after 3 the value network answers nothing, after 30 a fifth of what
    it samples is right, so that there is something to reward."""
    samples: int = 4
    """Answers sampled per question, from which the rejected one is chosen."""


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
    folder = options.run_dir
    _claim(folder, options)
    items = build_items()
    files = write_demonstrations(folder / "demonstrations", some_of(items, options.share))
    value = _trained_value(options, files)
    facts = [item for item in items if item.kind == "fact"]
    for split, name in (("train", "questions"), ("validation", "questions_held_out")):
        chosen = select(facts, "train" if split == "train" else "validation")
        write_questions(folder / f"{name}.jsonl", chosen)
        pairs = folder / f"{name.replace('questions', 'preferences')}.jsonl"
        if not pairs.exists():
            write_pairs(pairs, chosen, value, samples=options.samples)
    logger.info("written to %s: %s", folder, ", ".join(sorted(p.name for p in folder.iterdir())))


def _claim(folder: Path, options: Options) -> None:
    """Write down the options of a folder, or check that it was made with the same ones."""
    file, config = folder / _OPTIONS, load_config(options.config, TrainConfig)
    wanted = {
        "share": options.share,
        "epochs": options.epochs,
        "samples": options.samples,
        "config": config_to_toml(config),
    }
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
        return
    made = read_json_object(file)
    if differing := [key for key, value in wanted.items() if made.get(key) != value]:
        raise ConfigError(
            f"{folder} was made with other options ({', '.join(differing)}; see {file}): name "
            "another --run-dir, or remove it"
        )


def _trained_value(options: Options, files: dict[str, Path]) -> Path:
    """The value folder of S, and beside it the same network as a model folder."""
    run_dir = options.run_dir / "training"
    config, family_s = load_config(options.config, TrainConfig), str(family_folder("S"))
    data = dataclasses.replace(
        config.data,
        train=(str(files["train"]),),
        validation=(str(files["validation"]),),
        data_dir=str(options.run_dir / "data"),
    )
    wanted = dataclasses.replace(
        config,
        run_dir=str(run_dir),
        base=dataclasses.replace(config.base, path=family_s),
        value=dataclasses.replace(config.value, path=family_s),
        data=data,
        step=dataclasses.replace(config.step, epochs=options.epochs),
    )
    output = run_dir / "value"
    train_once("the value network", run_dir, output, config=lambda: wanted, run=run)
    exported = options.run_dir / "value"
    if not exported.exists():
        write_value_as_model(output, exported)
    return output


if __name__ == "__main__":
    sys.exit(main())
