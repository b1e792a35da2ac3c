"""The likelihood of held-out demonstrations under a composed model.

In: a composed model, demonstrations. Out: a table on the console, and the report as JSON.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console

from ivl_jax.config import RowsConfig
from ivl_jax.config.annotations import Inline
from ivl_jax.evaluation.flags import ModelFlags, check_reading

if TYPE_CHECKING:
    from ivl_jax.evaluation.likelihood_report import LikelihoodReport


@dataclass(frozen=True)
class Flags:
    """Held-out demonstrations: NLL, top-1, KL from the base, mean |z_value| by position."""

    model: Inline[ModelFlags] = field(default_factory=ModelFlags)
    data: tuple[str, ...] = ()
    """JSON or JSONL files of demonstrations, or one `tfds:NAME[/CONFIG][:SPLIT]`."""
    output: str = ""
    """JSON file of the report; empty: only print the table."""
    rows: Inline[RowsConfig] = field(default_factory=RowsConfig)
    max_length: int = 1024
    """The most tokens to read per dialogue; at most the models' context."""
    limit: int = 0
    """The number of demonstrations to read, always the same ones; 0: all."""
    batch_size: int = 8
    """Dialogues scored together."""
    data_dir: str = "data_cache"
    """Where the ArrayRecord form of the demonstrations is stored."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_reading(self)


def run(flags: Flags) -> "LikelihoodReport":
    """Run the evaluation; print the table and write the report.

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
    from ivl_jax.evaluation.held_out import read_held_out
    from ivl_jax.evaluation.likelihood_report import likelihood_report, show
    from ivl_jax.evaluation.loading import load_model

    held_out = read_held_out(
        flags.model,
        flags.data,
        rows=flags.rows,
        max_length=flags.max_length,
        limit=flags.limit,
        data_dir=flags.data_dir,
        outputs={"--output": flags.output},
    )
    model, console = load_model(held_out.sources), Console()
    report = likelihood_report(model, held_out.dialogues, batch_size=flags.batch_size)
    if flags.output:
        held_out.write_report(flags.output, "likelihood", report.to_json())
    show(report, model, console)
    held_out.show_rows(console)
    return report
