"""The pages that people write: what they quote is what the code says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_TROUBLES = (_ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
_MESSAGES = re.findall(r"^### `([^`]+)`$", _TROUBLES, re.MULTILINE)


def _text(node: ast.AST) -> str:
    """A string of the source, with … in place of what is filled in; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("%s", "…").replace("%d", "…")
    return ""


@cache
def _strings() -> list[str]:
    files = (_ROOT / "ivl_jax").rglob("*.py")
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return [text for tree in trees for node in ast.walk(tree) if (text := _text(node))]


@pytest.mark.parametrize("message", _MESSAGES)
def test_message_in_troubleshooting_is_printed_by_the_code(message: str) -> None:
    pieces = [piece.strip() for piece in message.split("…")]
    pattern = re.compile(".*".join(re.escape(piece) for piece in pieces if piece), re.DOTALL)
    assert any(pattern.search(text) for text in _strings())


def test_messages_are_found() -> None:
    assert len(_MESSAGES) >= 15


def test_recipes_list_every_config() -> None:
    page = (_ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    configs = {file.name for file in (_ROOT / "configs").glob("*.toml")}
    assert {name for name in configs if f"`{name}`" not in page} == set()
