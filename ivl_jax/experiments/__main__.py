"""The paper's comparisons at the embedded family's size: `python -m ivl_jax.experiments`.

In: the matrix. Out: `docs/experiments.md` with its figures and `docs/experiments.json` with every
number. What has been trained and measured is kept in the work directory, so the command may be
stopped and run again.
"""

import dataclasses
import json
import logging
import sys
from pathlib import Path

import tyro

from ivl_jax.config import TrainConfig, load_config
from ivl_jax.experiments.demonstrations import build_items
from ivl_jax.experiments.lab import InterruptedTrainingError, Laboratory
from ivl_jax.experiments.matrix import SEEDS, measurements
from ivl_jax.experiments.report import write_report

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train and measure everything, then write the report; a second run goes on."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of the trainings; the first one also runs the studies that only support a choice."""
    work_dir: Path = Path("runs/experiments")
    """Trained models and measured figures."""
    docs: Path = Path("docs")
    """Where the report goes."""
    config: Path = Path("configs/demo.toml")
    """What every training starts from."""
    report_only: bool = False
    """Write the report on what has been measured so far."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options)
    form = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout, force=True)
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    figures_file = options.docs / "experiments.json"
    if not options.report_only:
        config = load_config(options.config, TrainConfig)
        laboratory = Laboratory(options.work_dir, config, build_items())
        try:
            for measurement in measurements(options.seeds):
                figures = laboratory.measure(measurement)
                logger.info("%s: %s", measurement.name, figures)
        except InterruptedTrainingError as error:
            raise SystemExit(str(error)) from error
    measured = options.work_dir / "measured"
    figures = {
        measurement.name: json.loads(file.read_text(encoding="utf-8"))
        for measurement in measurements(options.seeds)
        if (file := measured / f"{measurement.name}.json").exists()
    }
    options.docs.mkdir(parents=True, exist_ok=True)
    figures_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_report(figures, options.docs, seeds=options.seeds)
    logger.info("report: %s", options.docs / "experiments.md")


if __name__ == "__main__":
    main()
