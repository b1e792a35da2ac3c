"""Generated sections of a Markdown page, each between two marks.

In: a page, a section's marks and text. Out: the page with the section there, or at its end.
"""

from pathlib import Path


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
