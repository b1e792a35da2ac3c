"""Files of questions and answers that tests of demonstrations write and read."""

import json
from pathlib import Path
from typing import Any

from ivl_jax.data.demonstrations import (
    DemonstrationSource,
    StoredDemonstrations,
)

QUESTION_ANSWER = {"user": "{question}", "assistant": "{answer}"}


def write(path: Path, rows: list[Any]) -> str:
    """Writes a JSONL file; texts are lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def row_of(number: int, **more: Any) -> dict[str, Any]:
    """A row of a question and its answer."""
    return {"question": f"What is {number}?", "answer": f"It is ü{number}.", **more}


def source_of(*train: str, **options: Any) -> DemonstrationSource:
    """Such rows as a source."""
    return DemonstrationSource(train, row_format="fields", templates=QUESTION_ANSWER, **options)


def row_ids(stored: StoredDemonstrations, split: str) -> list[str]:
    """File and line of each demonstration of a split."""
    return [demonstration.row_id for demonstration in stored.open(split)]
