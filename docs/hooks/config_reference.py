"""Writes the page of config fields from the dataclasses, while MkDocs builds the site.

In: the dataclasses of `ivl_jax.config`, with the docstrings of their fields. Out: a Markdown page
with one table per config table: field, type, default, meaning.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[2]))

from ivl_jax.config import InferConfig, ServeConfig, TrainConfig
from ivl_jax.config.annotations import INLINE, NO_FLAG, REPEATABLE, is_marked

_PAGE = "reference/config.md"
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "unset"}
_HEAD = """# Configuration

Generated from the dataclasses in `ivl_jax/config/`, which check every value; an unknown key is an
error that names the closest known one. `--help` shows the same fields.
"""
_TRAIN = """## train.py

A TOML file given as `--config`; each field is also a flag that overrides it: `--step.batch-size 8`
for `batch_size` in `[step]`. `python train.py --config FILE --help` shows the values in effect.
"""
_PROGRAMS = {"infer.py": InferConfig, "ivl-serve": ServeConfig}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as readers set it."""

    name: str
    type: str
    default: str
    about: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the site's files."""
    files.append(File.generated(config, _PAGE, content=render_page()))
    return files


def render_page() -> str:
    """The page's Markdown."""
    parts = [_HEAD, _TRAIN]
    for path, table in _tables(TrainConfig()):
        title = f"### [{path[:-1]}]\n\n{_summary(type(table))}\n" if path else "### Top level\n"
        parts += [title, _render_table("field", list(_fields(table)))]
    for program, kind in _PROGRAMS.items():
        parts += [
            f"## {program}\n\n{_summary(kind)}\n",
            _render_table("flag", list(_flags(kind()))),
        ]
    return "\n".join(parts)


def _tables(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and the tables within it, each with its path: `step.`."""
    yield path, config
    for name, table in _nested(config):
        yield from _tables(table, f"{path}{name}.")


def _nested(config: Any) -> Iterator[tuple[str, Any]]:
    for name, hint in _hints(type(config)).items():
        if dataclasses.is_dataclass(_bare(hint)):
            table = getattr(config, name)
            yield from _nested(table) if is_marked(hint, INLINE) else [(name, table)]


def _flags(config: Any) -> Iterator[Field]:
    for path, table in _tables(config):
        for row in _fields(table):
            yield dataclasses.replace(row, name=f"--{path}{row.name}".replace("_", "-"))


def _fields(config: Any) -> Iterator[Field]:
    """Fields of one table, with those of inline dataclasses in their place."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(_bare(hint)):
            if is_marked(hint, INLINE):
                yield from _fields(value)
        elif not is_marked(hint, NO_FLAG):
            about = _docstrings(type(config)).get(name, "")
            yield Field(name, _type_text(hint), _value_text(value), about)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _bare(hint: Any) -> Any:
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _type_text(hint: Any) -> str:
    """What a value may be, in words: `"a"` or `"b"`, list of text."""
    kind, arguments = _bare(hint), typing.get_args(_bare(hint))
    if typing.get_origin(kind) is Literal:
        return " or ".join(f"`{json.dumps(one)}`" for one in arguments)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(_type_text(one) for one in arguments)
    if dataclasses.is_dataclass(kind):
        return "tables"
    if arguments:
        each = _type_text(arguments[0])
        return f"{each}, repeatable" if is_marked(hint, REPEATABLE) else f"list of {each}"
    return _WORDS[kind]


def _value_text(value: Any) -> str:
    if value is None:
        return "unset"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


@functools.cache
def _docstrings(kind: type) -> dict[str, str]:
    """Field → the string that follows it in the class body."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    lines = typing.cast(ast.ClassDef, body).body
    found = {}
    for line, following in itertools.pairwise(lines):
        if isinstance(line, ast.AnnAssign) and isinstance(following, ast.Expr):
            name = typing.cast(ast.Name, line.target).id
            found[name] = " ".join(ast.literal_eval(following.value).split())
    return found


def _summary(kind: Any) -> str:
    return inspect.getdoc(kind) or ""


def _render_table(first: str, rows: list[Field]) -> str:
    lines = [f"| {first} | type | default | |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"`{row.name}`", row.type, row.default, row.about]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
