"""What the generated sections of a Markdown page are made of, and how they come into the page.

In: text and tables; a page and a section's marks. Out: Markdown; the page with the section between
its marks, or at its end.
"""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH = 120


def wrapped(text: str) -> str:
    """Paragraphs in lines of the page's width, whatever the numbers in them."""
    return "\n\n".join(
        textwrap.fill(each, _WIDTH, break_long_words=False, break_on_hyphens=False)
        for each in text.split("\n\n")
    )


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is on the left and the others on the right."""
    assert all(len(row) == len(headings) for row in rows), "one cell per heading"
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put_section_of(
    record: Path, section: Callable[[Mapping[str, Any]], str], *, begin: str, end: str
) -> None:
    """Put the section on a study's record into `experiments.md` beside it.

    Args:
        record: JSON file; without it nothing is written.
        section: Record → Markdown.
        begin: As for `put_section`, like the next.
        end: The mark after it.
    """
    if record.exists():
        shown = section(json.loads(record.read_text(encoding="utf-8")))
        put_section(record.with_name("experiments.md"), shown, begin=begin, end=end)


def put_section(page: Path, text: str, *, begin: str, end: str) -> None:
    """Put a section into a page, between its marks or at its end.

    Args:
        page: The Markdown file; made if there is none.
        text: The section.
        begin: The mark before it, a comment.
        end: The mark after it.
    """
    held = page.read_text(encoding="utf-8") if page.exists() else "# Experiments\n"
    before, _, rest = held.partition(begin)
    after = rest.partition(end)[2]
    parts = [before.rstrip(), begin, text, end, after.strip()]
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
