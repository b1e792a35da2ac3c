"""Other ways to use what a small training has learned, beside the value network.

`python -m ivl_jax.experiments baselines`. Out: `docs/baselines.json` with every number, and the
section of `docs/experiments.md` that shows them. Finished trainings and measurements are kept in
the work directory, so the command can be interrupted and run again.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivl_jax.assets import config_file
from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments.baselines.lab import BaselinesLaboratory
from ivl_jax.experiments.baselines.plan import SEEDS, Row, rows
from ivl_jax.experiments.baselines.report import RECORD, update_page
from ivl_jax.experiments.demonstrations import build_items, items_hash, select
from ivl_jax.experiments.kept_results import adopt_measurements, publish, split_measured
from ivl_jax.experiments.transfer.lab import Laboratory

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments baselines"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare baselines and strength policies on L, L-continued and X; a second run resumes."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of the value networks; the first one alone has the rows of X and of L-continued."""
    work_dir: Path = Path("runs/experiments")
    """Trained models and measured figures; those of `python -m ivl_jax.experiments` are shared."""
    references: Path = Path("runs/finetune_sweep")
    """Work directory of `python -m ivl_jax.experiments.finetune_sweep`: its models are not trained
    again."""
    docs: Path = Path("docs")
    """Where the report is written."""
    config: Path = dataclasses.field(default_factory=lambda: config_file("demo.toml"))
    """The config that every training starts from."""
    report_only: bool = False
    """Only write the report on what has been measured so far."""


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
    items = build_items()
    config = load_config(options.config, TrainConfig)
    matrix = Laboratory(options.work_dir, config, items, references=options.references)
    laboratory = BaselinesLaboratory(options.work_dir, matrix, items)
    adopt_measurements(options.docs / RECORD, laboratory.measured_dir)
    planned = list(rows(options.seeds))
    if not options.report_only:
        for number, row in enumerate(planned, 1):
            figures = laboratory.measure(row)
            logger.info("%d/%d %s: %s", number, len(planned), row.name, figures)
    record = record_of(laboratory, planned, items_sha256=items_hash(select(items, "test")))
    publish(record, options.docs / RECORD)
    update_page(options.docs)
    logger.info("report: %s", options.docs / "experiments.md")


def record_of(
    laboratory: BaselinesLaboratory, planned: Sequence[Row], *, items_sha256: str
) -> dict[str, Any]:
    """Everything that the report quotes.

    Args:
        laboratory: Has measured what there is.
        planned: The rows of the report.
        items_sha256: Of the test items.

    Returns:
        `measured`, figures by the name of their row; `missing`, the names without figures; and the
        hash of the test items.
    """
    found = {row.name: laboratory.kept(row) for row in planned}
    return {
        "items_sha256": items_sha256,
        **split_measured(found),
    }
