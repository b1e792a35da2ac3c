"""References nobody can doubt: `python -m ivl_jax.experiments.finetune_sweep`.

In: the family and the demo's demonstrations. Every model is fine-tuned over learning rate × length,
fully and with an adapter, on facts, docstrings or both; the grid grows until its best setting is
enclosed (`finetune.plan`). Each run stops early twice, by validation NLL and by exact match. Out:
`docs/finetune_sweep.json`: every run with its validation curve, and the test figures of the chosen
ones; and, when the search for a model has ended, its references (`finetune.references`). Finished
runs are kept in the work directory under a hash of their effective config, so the command can be
killed and run again; those of the published record are adopted by the same hash, so that another
machine goes on from it. What is adopted has figures and no model: a run whose model has to be
tested is made again.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.assets import config_file
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.compilation_cache import use_compilation_cache
from ivl_jax.config import ConfigError, TrainConfig, load_config
from ivl_jax.experiments.demonstrations import build_items
from ivl_jax.experiments.finetune.plan import MODELS, SEEDS, STAGES, Stage, chosen, missing_runs
from ivl_jax.experiments.finetune.references import record_file
from ivl_jax.experiments.finetune.report import RECORD
from ivl_jax.experiments.finetune.settings import Model, Setting, criteria
from ivl_jax.experiments.finetune.sweep import PROGRAM, Sweep
from ivl_jax.experiments.pretrain_family import XL_FOLDER
from ivl_jax.json_files import write_json

logger = logging.getLogger(__name__)

_MODEL_OF: dict[str, Callable[[dict[str, Any]], str]] = {
    "chosen": lambda one: one["model"],
    "runs": lambda one: one["setting"]["model"],
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune every reference until the best settings are enclosed; a second run resumes."""

    models: tuple[Model, ...] = MODELS
    """Which models; XL needs L's search to have ended."""
    xl: Path = XL_FOLDER
    """Folder of XL, made by `python -m ivl_jax.experiments.pretrain_family --model XL`."""
    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """What else there is to set: the demo's own settings."""
    work_dir: Path = Path("runs/finetune_sweep")
    """Where the runs go."""
    docs: Path = Path("docs")
    """Where the record is written."""
    report_only: bool = False
    """Only write the record of what has been run so far."""


def run_stage(sweep: Sweep, stage: Stage, *, docs: Path) -> None:
    """Run what a stage misses until nothing is missing, and test what it chose.

    Args:
        sweep: Keeps the records.
        stage: Of `STAGES`.
        docs: Where the record is written after every run.
    """
    while left := missing_runs(stage, sweep.tried):
        logger.info("%s %s %s: %d runs to make; %s", *stage, len(left), sweep.estimate())
        sweep.run(left[0])
        publish_runs(sweep, docs / RECORD)
    tried = sweep.tried
    best = chosen(tried, stage.model, stage.kinds)
    for criterion in criteria(stage.kinds):
        if (setting := best.get(criterion)) is None:
            continue
        for seed in SEEDS:
            one = dataclasses.replace(setting, seed=seed)
            if one in tried:
                logger.info("%s by %s: %s", one, criterion, sweep.test(one, criterion))
    publish_runs(sweep, docs / RECORD)


def publish_runs(sweep: Sweep, file: Path) -> None:
    """Write the record; what it has of models that have no run here stays in it.

    Args:
        sweep: Has the runs.
        file: The published record; without any run nothing is written.
    """
    record = sweep.record()
    here = {setting.model for setting in sweep.tried}
    if not here:
        return
    if file.exists():
        published = json.loads(file.read_text(encoding="utf-8"))
        for part, model_of in _MODEL_OF.items():
            record[part] += [one for one in published[part] if model_of(one) not in here]
        record["runs"].sort(key=lambda one: str(Setting(**one["setting"])))
    write_json(file, record, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    return long_run_command(PROGRAM, _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=PROGRAM)
    log_to_stdout(times=True)
    config = load_config(options.config, TrainConfig)
    use_compilation_cache(config.runtime.compilation_cache)
    if "XL" in options.models and not (options.xl / "config.json").exists():
        raise ConfigError(
            f"--xl {options.xl}: no model is there; make it with "
            "`python -m ivl_jax.experiments.pretrain_family --model XL`"
        )
    sweep = Sweep(options.work_dir, config, build_items(), xl=options.xl)
    options.docs.mkdir(parents=True, exist_ok=True)
    if options.report_only:
        publish_runs(sweep, options.docs / RECORD)
        return
    for model in options.models:
        sweep.adopt(options.docs / RECORD, model)
    for stage in STAGES:
        if stage.model in options.models:
            run_stage(sweep, stage, docs=options.docs)
    for model in options.models:
        if (record := sweep.reference(model)) is not None:
            write_json(record_file(model), record, indent=2)


if __name__ == "__main__":
    sys.exit(main())
