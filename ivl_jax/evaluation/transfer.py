"""Will value networks help this base? An answer from a few dialogues, before any fine-tuning.

In: a base, value networks, about 50 demonstrations. Out: tables on the console, the report as JSON,
a figure.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ivl_jax.config import ConfigError, RowsConfig
from ivl_jax.config.annotations import Inline
from ivl_jax.evaluation.flags import ModelFlags, check_reading

if TYPE_CHECKING:
    from ivl_jax.evaluation.transfer_report import TransferReport


@dataclass(frozen=True)
class Flags:
    """Will it transfer? The gain over the base with an interval, where, and at which strength."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    data: tuple[str, ...] = ()
    """JSON or JSONL files of demonstrations, or one `tfds:NAME[/CONFIG][:SPLIT]`."""
    output: str = ""
    """JSON file of the report; empty: only print it."""
    plot: str = ""
    """PNG file of the report's figure; empty: none."""
    rows: Inline[RowsConfig] = field(default_factory=RowsConfig)
    max_length: int = 1024
    """The most tokens to read per dialogue; at most the models' context."""
    limit: int = 50
    """The number of demonstrations to read, spread over the files; 0: all."""
    batch_size: int = 8
    """Dialogues scored together."""
    calibrate: bool = False
    """Also fit strengths and a temperature to these dialogues; it takes several times as long."""
    data_dir: str = "data_cache"
    """Where the ArrayRecord form of the demonstrations is stored."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_reading(self)


def run(flags: Flags) -> "TransferReport":
    """Run the evaluation; print the tables, write the report and the figure.

    Args:
        flags: of the command line.

    Returns:
        The report.

    Raises:
        ConfigError: flags are missing or inconsistent.
        ValueError: demonstrations or models cannot be used; raised before any weight is read if
            possible.
    """
    # Imported here: JAX takes a second, which --help should not wait for.
    import numpy as np

    from ivl_jax.evaluation.calibration import calibration_report
    from ivl_jax.evaluation.held_out import first_copies, read_held_out, rows_of
    from ivl_jax.evaluation.loading import load_model
    from ivl_jax.evaluation.transfer_report import transfer_report
    from ivl_jax.evaluation.transfer_view import plot, show, show_calibration

    composed, problems = flags.model.composed, []
    # A missing --value is a problem of its own.
    if composed.value == ("none",):
        problems.append("--value none is the base alone, which has nothing to transfer")
    if composed.strength and not any(composed.strength):
        problems.append("--strength is 0 for every value, which is the base alone")
    if flags.calibrate and not composed.policy.is_constant:
        problems.append(
            f"--calibrate fits constant strengths, which --strength-policy {composed.policy.name} "
            "varies from token to token: leave one of the two out"
        )
    if flags.plot and Path(flags.plot).suffix.lower() != ".png":
        problems.append(f"--plot {flags.plot} must end with .png")
    held_out = read_held_out(
        flags.model,
        flags.data,
        rows=flags.rows,
        max_length=flags.max_length,
        limit=flags.limit,
        data_dir=flags.data_dir,
        outputs={"--output": flags.output, "--plot": flags.plot},
        problems=problems,
    )
    dialogues, console = held_out.dialogues, Console()
    # A copy in the other half would not be unseen.
    distinct = np.unique(first_copies(dialogues)).tolist()
    if flags.calibrate and len(distinct) < 2:
        raise ConfigError(
            "--calibrate fits each half of the dialogues and judges it by the other: expected at "
            f"least 2 different dialogues, got {len(distinct)}"
        )
    model = load_model(held_out.sources)
    report = transfer_report(model, dialogues, batch_size=flags.batch_size)
    figures = report.to_json()
    if flags.output:
        held_out.write_report(flags.output, "transfer", figures)
    if flags.plot:
        plot(report, Path(flags.plot), base=composed.base, values=composed.value)
    show(report, model.strengths, console)
    held_out.show_rows(console)
    if flags.calibrate:
        rows = rows_of(model, dialogues)
        fit = calibration_report(
            model,
            [rows[index] for index in distinct],
            [dialogues[index].loss_mask[1:] for index in distinct],
            batch_size=flags.batch_size,
        )
        show_calibration(fit, console)
        if flags.output:
            calibrated = figures | {"calibration": dataclasses.asdict(fit)}
            held_out.write_report(flags.output, "transfer", calibrated)
    return report
