"""What post-training through a composition is good for, measured on the embedded family.

`python -m ivl_jax.experiments post_training`. Out: `docs/post_training.json` with every number, and
the section of `docs/experiments.md` that shows them. Finished trainings and measurements are kept
in the work directory, so the command can be interrupted and run again.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.experiments.demo_post_training import Options as DataOptions
from ivl_jax.experiments.demonstrations import build_items
from ivl_jax.experiments.kept_results import adopt_measurements, publish, split_measured
from ivl_jax.experiments.post_training.configs import (
    DPO_EPOCHS,
    GRPO_STEPS,
    Settings,
    shown_settings,
)
from ivl_jax.experiments.post_training.lab import PostTrainingLaboratory
from ivl_jax.experiments.post_training.plan import (
    KINDS,
    SEEDS,
    Measurement,
    Run,
    measurements,
    sweeps,
)
from ivl_jax.experiments.post_training.report import RECORD, update_page

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments post_training"
_DATA = DataOptions()


@dataclasses.dataclass(frozen=True)
class Options:
    """Post-train value networks beside S, carry them to L and X; a second run resumes."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of the trainings; the first one also has the rows that only support a choice."""
    share: float = _DATA.share
    """Share of the training demonstrations that every start is trained on."""
    epochs: float = _DATA.epochs
    """Passes over that share."""
    samples: int = _DATA.samples
    """Answers sampled per question, from which the rejected one is chosen."""
    grpo_steps: int = GRPO_STEPS
    """Optimizer steps of GRPO."""
    dpo_epochs: float = DPO_EPOCHS
    """Passes over the pairs."""
    work_dir: Path = Path("runs/experiments_post_training")
    """Trained models and measured figures; each is kept under a hash of its settings."""
    docs: Path = Path("docs")
    """Where the report is written."""
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
    settings = Settings(
        share=options.share,
        epochs=options.epochs,
        samples=options.samples,
        grpo_steps=options.grpo_steps,
        dpo_epochs=options.dpo_epochs,
    )
    laboratory = PostTrainingLaboratory(options.work_dir, build_items(), settings)
    adopt_measurements(options.docs / RECORD, laboratory.measured_dir)
    planned = list(measurements(options.seeds))
    if not options.report_only:
        for number, measurement in enumerate(planned, 1):
            figures = laboratory.measure(measurement)
            logger.info("%d/%d %s: %s", number, len(planned), measurement.name, figures)
    record = record_of(laboratory, planned, settings, seeds=options.seeds)
    publish(record, options.docs / RECORD)
    update_page(options.docs)
    logger.info("report: %s", options.docs / "experiments.md")


def record_of(
    laboratory: PostTrainingLaboratory,
    planned: Sequence[Measurement],
    settings: Settings,
    *,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Everything that the report quotes.

    Args:
        laboratory: Has measured what there is.
        planned: The measurements of the report.
        settings: Of the study.
        seeds: Of the trainings.

    Returns:
        `seeds`; `measured`, figures by the name of their measurement; `settings`, of each kind of
        training that can be described without further trainings; `missing`, the names without
        figures.
    """
    found = {one.name: laboratory.kept(one) for one in planned}
    runs = {f"{kind} beside S": Run(kind, "S") for kind in KINDS}
    runs |= {f"{kind} alone": Run(kind, "L", alone=True) for kind in KINDS}
    known = {
        name: laboratory.config_of(run)
        for name, run in runs.items()
        if all(laboratory.kept(one) is not None for one in sweeps(run))
    }
    return {
        "seeds": list(seeds),
        "settings": dataclasses.asdict(settings) | shown_settings(known),
        **split_measured(found),
    }
