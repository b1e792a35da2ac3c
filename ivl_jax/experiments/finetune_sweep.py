"""Full fine-tuning of a target, swept: `python -m ivl_jax.experiments.finetune_sweep`.

In: the demo's demonstrations. Out: `assets/family/finetuned_L.json`: every learning rate, length
and batch size tried, with its validation NLL, and the test figures of the best one. A badly tuned
fine-tune would flatter the transfer ratio, so the sweep is part of the record. A second run skips
finished settings.
"""

import dataclasses
import itertools
import json
import logging
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ivl_jax.assets import config_file, family_folder
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import TrainConfig, load_config
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.demonstrations import (
    Item,
    build_items,
    items_hash,
    select,
    write_demonstrations,
)
from ivl_jax.experiments.measure import answers, exact_match, response_nll
from ivl_jax.training.loop import run
from ivl_jax.weights.language_model import load_language_model

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments.finetune_sweep"

# Figures of every setting on the validation split; the first one selects the best setting.
_MEASURED = ("validation_nll", "validation_exact_match")


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a target with every setting, select on validation, report on test."""

    model: Literal["S", "L", "X"] = "L"
    """The target."""
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Peak learning rates."""
    epochs: tuple[float, ...] = (1.0, 3.0)
    """Passes over the training demonstrations."""
    batch_sizes: tuple[int, ...] = (4,)
    """Packed rows per step."""
    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """What else there is to set: the demo's own settings."""
    work_dir: Path = Path("runs/finetune_sweep")
    """Where the runs go."""


class Setting(NamedTuple):
    """What is swept."""

    learning_rate: float
    epochs: float
    batch_size: int


def record_file(model: str) -> Path:
    """Where the figures of a fully fine-tuned target are recorded."""
    return family_folder("L").parent / f"finetuned_{model}.json"


def finetune_config(
    config: TrainConfig, files: dict[str, Path], *, model: Path, run_dir: Path, setting: Setting
) -> TrainConfig:
    """The demo's config, turned into a full fine-tuning of a model on the same demonstrations."""
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        method="sft",
        base=dataclasses.replace(config.base, path=str(model)),
        penalty=dataclasses.replace(config.penalty, kind="none", weight=0.0),
        data=dataclasses.replace(
            config.data,
            train=(str(files["train"]),),
            validation=(str(files["validation"]),),
            data_dir=str(run_dir.parent / "data"),
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=setting.learning_rate),
        step=dataclasses.replace(config.step, epochs=setting.epochs, batch_size=setting.batch_size),
    )


def sweep(options: Options, items: list[Item]) -> dict[str, Any]:
    """Runs what has not been run, and measures the best of all runs on the test split.

    Args:
        options: Command-line options.
        items: From `build_items`.

    Returns:
        The record.
    """
    config = load_config(options.config, TrainConfig)
    files = write_demonstrations(options.work_dir / "demonstrations", items)
    validation, test = select(items, "validation"), select(items, "test")
    told = [item for item in validation if item.kind == "fact"]
    folder = family_folder(options.model)
    for setting in map(
        Setting._make,
        itertools.product(options.learning_rates, options.epochs, options.batch_sizes),
    ):
        rate, epochs, batch_size = setting
        name = f"{options.model}_rate{rate:g}_epochs{epochs:g}_batch{batch_size}"
        run_dir = options.work_dir / name
        result_file = run_dir / "sweep.json"
        if not result_file.exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            result = run(
                finetune_config(config, files, model=folder, run_dir=run_dir, setting=setting)
            )
            if result.output is None:
                raise SystemExit("interrupted; run the same command again to go on")
            model = compose(load_language_model(str(result.output)))
            entry = setting._asdict() | {
                "items_sha256": items_hash(items),
                "validation_nll": response_nll(model, validation),
                "validation_exact_match": exact_match(answers(model, told), told),
                "model_folder": str(result.output),
            }
            result_file.write_text(json.dumps(entry), encoding="utf-8")
            logger.info("%s", entry)
    # What an earlier command tried on the same items counts too.
    results = sorted(options.work_dir.glob(f"{options.model}_*/sweep.json"))
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in results]
    tried = [entry for entry in entries if entry["items_sha256"] == items_hash(items)]
    best = min(tried, key=lambda entry: entry[_MEASURED[0]])
    model = compose(load_language_model(best["model_folder"]))
    facts = [item for item in test if item.kind == "fact"]
    return {
        "model": options.model,
        "nll": response_nll(model, test),
        "exact_match": exact_match(answers(model, facts), facts),
        "test_items_sha256": items_hash(test),
        **{key: best[key] for key in Setting._fields},
        "tried": [{key: entry[key] for key in (*Setting._fields, *_MEASURED)} for entry in tried],
        "command": f"python -m ivl_jax.experiments.finetune_sweep --model {options.model}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


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
    record = sweep(options, build_items())
    file = record_file(options.model)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    logger.info("%s: %s", file, record)


if __name__ == "__main__":
    sys.exit(main())
