"""Generations of a benchmark, written to a file one by one; a second run resumes.

In: a composed model, prompts, a JSONL file with the lines already written. Out: the complete file.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ivl_jax import json_files
from ivl_jax.config import ConfigError
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.decoding.prompt_files import GenerationFile
from ivl_jax.decoding.requests import EncodedPrompt

logger = logging.getLogger(__name__)

_MOST_PROBLEMS_NAMED = 20


def generate_to_file(
    model: ComposedModel,
    prompts: Sequence[EncodedPrompt],
    output: GenerationFile,
    *,
    batch_size: int,
    judge: Callable[[int, str], Mapping[str, Any]] = lambda index, text: {},
) -> None:
    """Generate for the prompts that have no line yet, and write one line for each.

    Args:
        model: the model that generates.
        prompts: all of them, in the file's order.
        output: the file; closed afterwards.
        batch_size: prompts decoded together.
        judge: given the prompt's index and the generated text, returns further fields of the line.

    Raises:
        GenerationError: a generation ended with an error; the lines before it are in the file.
    """
    if output.done:
        logger.info("%d of %d items are done already", output.done, len(prompts))
    with output, progress_bar("generating") as progress:
        task = progress.add_task("", total=len(prompts), completed=output.done)
        left = prompts[output.done :]
        for generation in model.generate_prepared(left, batch_size=batch_size):
            text = generation.text_of(output.next_row.where)
            judged = judge(output.done, text)
            output.append([generation.to_record() | dict(judged)])
            progress.update(task, completed=output.done)


def progress_bar(doing: str) -> Progress:
    """A progress bar on standard error that counts items."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("items"), TimeRemainingColumn())
    return Progress(TextColumn(doing), *columns, console=Console(stderr=True))


def read_json_lines(
    flag: str, path: Path, *, problem_of: Callable[[Any], str | None], expected: str
) -> list[tuple[str, dict[str, Any]]]:
    """Read a whole file of JSON objects, strictly.

    Args:
        flag: the flag that names the file, for messages.
        path: JSONL; empty lines are skipped.
        problem_of: returns what is wrong with a row, or None.
        expected: what a row should look like, for messages.

    Returns:
        (`FILE:LINE`, row) of each line, at least one.

    Raises:
        ConfigError: no such file, an empty file, or malformed lines (names at most 20).
    """
    if not path.is_file():
        raise ConfigError(f"{flag}: no file at {path}")
    rows, problems = [], []
    for line in json_files.read_json_lines(path):
        where = f"{path}:{line.number}"
        if line.error is not None:
            problems.append(f"{where}: {line.error.reason}")
        elif problem := problem_of(line.value) if isinstance(line.value, dict) else "not an object":
            problems.append(f"{where}: {problem}")
        else:
            rows.append((where, line.value))
    if problems:
        more = len(problems) - _MOST_PROBLEMS_NAMED
        named = "\n".join(f"  - {problem}" for problem in problems[:_MOST_PROBLEMS_NAMED])
        raise ConfigError(
            f"{flag}: {len(problems)} malformed line(s); expected {expected}:\n{named}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    if not rows:
        raise ConfigError(f"{flag}: {path} is empty; expected {expected}")
    return rows


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    json_files.write_json(path, dict(summary), indent=2)
