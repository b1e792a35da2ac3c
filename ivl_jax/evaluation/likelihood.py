"""The likelihood of held-out demonstrations under a composed model.

In: a composed model, demonstrations. Out: a table on the console, and the report as JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ivl_jax.config import ConfigError, RowsConfig, model_problems
from ivl_jax.config.annotations import Inline
from ivl_jax.config.checks import remote_problem
from ivl_jax.evaluation.flags import ModelFlags, require

if TYPE_CHECKING:
    from ivl_jax.data.formats import Demonstration
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
    from ivl_jax.data.tokenized import tokenize_demonstrations
    from ivl_jax.evaluation.likelihood_report import likelihood_report, show
    from ivl_jax.evaluation.loading import chat_format_of, find_sources, load_model

    problems = model_problems(flags.model.composed)
    problems += [] if flags.data else ["--data is missing: name files of demonstrations"]
    if flags.model.composed.draft:
        problems.append("--draft has no effect, since nothing is generated here: leave it out")
    if problem := remote_problem("--output", flags.output):
        problems.append(problem)
    require(problems)
    output = _writable(Path(flags.output)) if flags.output else None
    sources = find_sources(flags.model)
    if any(sources.prompts.own_vocabularies) and flags.model.chat_template:
        raise ConfigError(
            f"--chat-template {flags.model.chat_template}: a value network with its own vocabulary "
            "reads dialogues only in its own template: leave the flag out"
        )
    chat = chat_format_of(sources)
    demonstrations = _read(flags)
    dialogues = tokenize_demonstrations(
        demonstrations,
        chat,
        sequence_length=min(flags.max_length, sources.prompts.context),
        cache_dir=None,
        max_malformed_share=flags.rows.max_malformed_fraction,
    )
    model = load_model(sources)
    report = likelihood_report(model, dialogues, batch_size=flags.batch_size)
    show(report, model, Console())
    if output is not None:
        about = {
            "benchmark": "likelihood",
            "model": sources.to_json(),
            "data": list(flags.data),
            "chat_template": chat.name,
            "dialogues": dialogues.report.kept,
            "cut": dialogues.report.cut,
        }
        output.write_text(json.dumps(about | report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


def _read(flags: Flags) -> "Sequence[Demonstration]":
    """The demonstrations, stored once, as in training."""
    import numpy as np

    from ivl_jax.data.demonstrations import DemonstrationSource, store_demonstrations

    source = DemonstrationSource(
        train=flags.data,
        row_format=flags.rows.format,
        templates=flags.rows.templates,
        validation_fraction=0.0,
    )
    stored = store_demonstrations(
        source, data_dir=flags.data_dir, max_malformed_share=flags.rows.max_malformed_fraction
    )
    split = stored.open("train")
    if not 0 < flags.limit < len(split):
        return split
    # Spread over the file, whose beginning may not be representative.
    return [split[int(i)] for i in np.linspace(0, len(split) - 1, flags.limit).astype(int)]


def _writable(path: Path) -> Path:
    """Create the path's folder; an existing report will be replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
