"""Trainings and measurements of an experiment that are made once and kept in its work directory.

In: what makes one. Out: the kept folder or record where there is one, else a new one.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ivl_jax.config import TrainConfig
from ivl_jax.json_files import write_json
from ivl_jax.training.loop import TrainResult

logger = logging.getLogger(__name__)


class InterruptedTrainingError(RuntimeError):
    """A training was interrupted; its state is saved, and the same command resumes it."""


def kept_record(file: Path, wanted: Mapping[str, str]) -> dict[str, Any] | None:
    """Read a measurement.

    Args:
        file: Its JSON file.
        wanted: Entries that it must have, hashes of what was measured and on what.

    Returns:
        The record; None if there is none, or if it is about something else.
    """
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record if wanted.items() <= record.items() else None


def measure_once(
    name: str, file: Path, wanted: Mapping[str, str], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Measure, unless already done.

    Args:
        name: For messages.
        file: JSON file of the measurement; its folder is made.
        wanted: As for `kept_record`.
        measure: Makes the figures.

    Returns:
        The figures, and what is wanted.
    """
    kept = kept_record(file, wanted)
    if kept is not None:
        return kept
    logger.info("measuring %s", name)
    record = {**measure(), **wanted}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record, indent=2)
    return record


def adopt_measurements(record: Path, folder: Path) -> None:
    """Lay a published record's measurements into a work directory, for `kept_record` to find.

    So a study goes on where another machine stopped: what was measured there with today's settings,
    which the hashes in each measurement tell, is not trained and measured again.

    Args:
        record: JSON file with `measured`, records by name; a missing one adopts nothing.
        folder: For one file per measurement; existing ones stay.
    """
    if not record.exists():
        return
    for name, figures in json.loads(record.read_text(encoding="utf-8"))["measured"].items():
        file = folder / f"{name}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, figures, indent=2)


def split_measured(found: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What a study's record says of its measurements.

    Args:
        found: Name → figures, None where it has not been measured.

    Returns:
        `measured`, figures by name; `missing`, the names without figures.
    """
    return {
        "measured": {name: figures for name, figures in found.items() if figures is not None},
        "missing": [name for name, figures in found.items() if figures is None],
    }


def publish(record: Mapping[str, Any], file: Path) -> None:
    """Write a study's record for its page; without a measurement the published one stays.

    Args:
        record: With `split_measured`'s entries.
        file: JSON file; its folder is made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if record["measured"]:
        write_json(file, record, indent=1)


def train_once(
    name: str,
    run_dir: Path,
    output: Path,
    *,
    config: Callable[[], TrainConfig],
    run: Callable[[TrainConfig], TrainResult],
) -> Path:
    """Train, unless already done; an interrupted training resumes.

    Args:
        name: For messages.
        run_dir: The run directory.
        output: What a finished training leaves there.
        config: Makes the config, if it is needed.
        run: Trains.

    Returns:
        The value folder, or the model folder of a model trained alone.

    Raises:
        InterruptedTrainingError: It was stopped.
    """
    if output.exists():
        return output
    wanted = dataclasses.replace(config(), resume=(run_dir / "config.toml").exists())
    logger.info("training %s", name)
    result = run(wanted)
    if result.output is None:
        raise InterruptedTrainingError(f"{name} was stopped: run the command again")
    # Only the result is used again; keeping all checkpoints would fill a disk.
    shutil.rmtree(run_dir / "checkpoints")
    return Path(result.output)
