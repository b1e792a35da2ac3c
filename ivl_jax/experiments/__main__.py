"""The paper's comparisons at the embedded family's size: `python -m ivl_jax.experiments`.

In: the matrix. Out: `docs/experiments.md` with its figures and `docs/experiments.json` with every
number. Finished trainings and measurements are kept in the work directory, so the command can be
interrupted and run again. `python -m ivl_jax.experiments post_training` is the study of objectives
other than demonstrations (`post_training.study`), `… baselines` that of other ways to use what was
learned, `… lifts` that of ways to train for transfer, `… real` the experiment on a real model
(`real.study`), and `… vocabulary_maps` compares vocabulary maps.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ivl_jax.assets import config_file
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments import vocabulary_maps
from ivl_jax.experiments.baselines import study as baselines
from ivl_jax.experiments.demonstrations import build_items, items_hash, select
from ivl_jax.experiments.kept_results import adopt_measurements, publish, split_measured
from ivl_jax.experiments.lifts import study as lifts
from ivl_jax.experiments.page import write_page
from ivl_jax.experiments.post_training import study as post_training_study
from ivl_jax.experiments.pretrain_family import XL_FOLDER
from ivl_jax.experiments.real import study as real_study
from ivl_jax.experiments.transfer.lab import Laboratory
from ivl_jax.experiments.transfer.matrix import RECORD, SEEDS, measurements

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments"


@dataclasses.dataclass(frozen=True)
class Options:
    """Train and measure everything, then write the report; a second run resumes."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of the trainings; the first one also runs the studies that only support a choice."""
    work_dir: Path = Path("runs/experiments")
    """Trained models and measured figures."""
    docs: Path = Path("docs")
    """Where the report is written."""
    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """The config that every training starts from."""
    references: Path = Path("runs/finetune_sweep")
    """Work directory of `python -m ivl_jax.experiments.finetune_sweep`: its models are not trained
    again."""
    xl: Path = XL_FOLDER
    """Folder of XL, made by `python -m ivl_jax.experiments.pretrain_family --model XL`; without it,
    its rows are left out."""
    report_only: bool = False
    """Only write the report on what has been measured so far."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: of this process.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    studies = {
        "baselines": baselines.main,
        "lifts": lifts.main,
        "post_training": post_training_study.main,
        "real": real_study.main,
        "vocabulary_maps": vocabulary_maps.main,
    }
    if arguments and arguments[0] in studies:
        return studies[arguments[0]](arguments[1:])
    return long_run_command(_PROGRAM, _run, arguments)


def _run(arguments: Sequence[str]) -> None:
    options = parse_flags(Options, arguments, prog=_PROGRAM)
    log_to_stdout(times=True)
    items = build_items()
    config = load_config(options.config, TrainConfig)
    laboratory = Laboratory(
        options.work_dir, config, items, references=options.references, xl=options.xl
    )
    planned = list(measurements(options.seeds))
    adopt_measurements(options.docs / RECORD, laboratory.measured_dir)
    if not options.report_only:
        for number, measurement in enumerate(planned, 1):
            if laboratory.kept(measurement) is None and laboratory.lacks(measurement):
                logger.warning("%s: left out: %s", measurement.name, laboratory.lacks(measurement))
                continue
            figures = laboratory.measure(measurement)
            logger.info("%d/%d %s: %s", number, len(planned), measurement.name, figures)
    found = {measurement.name: laboratory.kept(measurement) for measurement in planned}
    test_hash = items_hash(select(items, "test"))
    publish({"items_sha256": test_hash, **split_measured(found)}, options.docs / RECORD)
    # Without any of today's items, those of the published record are shown.
    file = options.docs / RECORD
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"measured": {}}
    write_page(record["measured"], options.docs, seeds=options.seeds)
    logger.info("report: %s", options.docs / "experiments.md")


if __name__ == "__main__":
    sys.exit(main())
