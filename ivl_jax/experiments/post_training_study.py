"""What post-training through a composition is good for, measured on the embedded family.

`python -m ivl_jax.experiments post_training`. Out: `docs/post_training.json` with every number, and
the section of `docs/experiments.md` that shows them. Finished trainings and measurements are kept
in the work directory, so the command can be interrupted and run again.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ivl_jax.command_line.console import log_to_stdout
from ivl_jax.command_line.flags import parse_flags
from ivl_jax.command_line.guard import long_run_command
from ivl_jax.experiments.demonstrations import build_items
from ivl_jax.experiments.post_training import Options as DataOptions
from ivl_jax.experiments.post_training_lab import PostTrainingLaboratory, Settings
from ivl_jax.experiments.post_training_plan import SEEDS, measurements
from ivl_jax.experiments.post_training_report import RECORD, update_page
from ivl_jax.json_files import write_json

logger = logging.getLogger(__name__)

_PROGRAM = "python -m ivl_jax.experiments post_training"
_DATA = DataOptions()

# A model trained alone has up to nine times the parameters of the value network.
ALONE_RATES = {"sft": 5e-4, "dpo": 1e-4, "grpo": 1e-4}


@dataclasses.dataclass(frozen=True)
class Options:
    """Post-train value networks beside S, carry them to L and X; a second run resumes."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of the value networks trained beside S."""
    alone_seeds: tuple[int, ...] = (0,)
    """Seeds of the targets trained themselves, and of distillation."""
    share: float = _DATA.share
    """Share of the training demonstrations that every start is trained on."""
    epochs: float = _DATA.epochs
    """Passes over that share."""
    samples: int = _DATA.samples
    """Answers sampled per question, from which the rejected one is chosen."""
    work_dir: Path = Path("runs/experiments_post_training")
    """Trained models and measured figures."""
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
    planned = list(measurements(options.seeds, options.alone_seeds))
    if not options.report_only:
        settings = Settings(options.share, options.epochs, options.samples, ALONE_RATES)
        laboratory = PostTrainingLaboratory(options.work_dir, build_items(), settings)
        for measurement in planned:
            figures = laboratory.measure(measurement)
            logger.info("%s: %s", measurement.name, figures)
    files = {one.name: options.work_dir / "measured" / f"{one.name}.json" for one in planned}
    figures = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }
    options.docs.mkdir(parents=True, exist_ok=True)
    if figures:  # without any, the committed ones are shown
        write_json(options.docs / RECORD, figures, indent=2)
    update_page(options.docs)
    logger.info("report: %s", options.docs / "experiments.md")
