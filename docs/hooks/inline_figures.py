"""Puts drawings into the page itself, so that they take the colours of its scheme.

In: Markdown with `![text](drawing.svg)`, which other viewers show as an image. Out: the SVG in
place of the image.
"""

import re
from pathlib import Path
from typing import Any

_FIGURE = re.compile(r"^!\[[^\]]*\]\((\w+\.svg)\)$", re.MULTILINE)


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replace the drawings of a page."""
    folder = Path(config.docs_dir)

    def inline(found: re.Match[str]) -> str:
        drawing = (folder / found[1]).read_text(encoding="utf-8")
        return f'<figure class="drawing">\n{drawing}</figure>'

    return _FIGURE.sub(inline, markdown)
