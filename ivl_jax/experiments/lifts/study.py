"""What lifts transfer: each way to train is tried on validation rows, the best one is tested.

`python -m ivl_jax.experiments lifts`. Out: `docs/lifts.json` with every number, and the section of
`docs/experiments.md` that shows them. Finished trainings and measurements are kept in the work
directory, so the command can be interrupted and run again.
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
from ivl_jax.experiments.changed_config import with_options
from ivl_jax.experiments.demonstrations import Item, build_items
from ivl_jax.experiments.kept_results import adopt_measurements, publish, split_measured
from ivl_jax.experiments.lifts.lab import LiftsLaboratory
from ivl_jax.experiments.lifts.plan import (
    QUICK,
    SEEDS,
    Budget,
    best_lift,
    final_rows,
    validation_rows,
)
from ivl_jax.experiments.lifts.report import RECORD, update_page

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments lifts"
_QUICK_ITEMS = 4
_QUICK_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Options:
    """Try each lift of transfer on validation rows, then test the best; a second run resumes."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of the value networks; the first one alone has all lifts."""
    quick: bool = False
    """Two steps of everything on a few items, to see that it works; the report is written to the
    work directory."""
    work_dir: Path = Path("runs/experiments")
    """Trained models and measured figures; those of `python -m ivl_jax.experiments` are shared."""
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
    items, config = build_items(), load_config(options.config, TrainConfig)
    work_dir, docs, budget = options.work_dir, options.docs, Budget()
    if options.quick:
        work_dir, docs, budget = work_dir / "quick", work_dir / "quick" / "docs", QUICK
        items, config = few(items), with_options(config, {"step": {"max_steps": _QUICK_STEPS}})
    laboratory = LiftsLaboratory(work_dir, config, items, budget)
    adopt_measurements(docs / RECORD, laboratory.measured_dir)
    if not options.report_only:
        tried = {row: laboratory.measure(row) for row in validation_rows(options.seeds[0])}
        best = best_lift({row.name: each for row, each in tried.items()}, options.seeds[0])
        for row in final_rows(best, options.seeds):
            logger.info("%s: %s", row.name, laboratory.measure(row))
    record = record_of(laboratory, options.seeds)
    publish(record, docs / RECORD)
    update_page(docs)
    logger.info("report: %s", docs / "experiments.md")


def few(items: Sequence[Item]) -> list[Item]:
    """The first items of each kind in each split."""
    parts: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        parts.setdefault((item.kind, item.split), []).append(item)
    return [item for part in parts.values() for item in part[:_QUICK_ITEMS]]


def record_of(laboratory: LiftsLaboratory, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that the report quotes.

    Args:
        laboratory: Has measured what there is.
        seeds: Of the study.

    Returns:
        `measured`, figures by the name of their row; `missing`, the names without figures; `best`,
        the chosen lift, or None while one is missing; `seeds`.
    """
    tried = {row.name: laboratory.kept(row) for row in validation_rows(seeds[0])}
    best = best_lift({name: each for name, each in tried.items() if each}, seeds[0])
    found = tried | {row.name: laboratory.kept(row) for row in final_rows(best, seeds)}
    return {
        "seeds": list(seeds),
        "best": best,
        **split_measured(found),
    }
