"""Reads one row of a demonstrations file as a dialogue: a table of formats, one entry each.

In: a row as a dict and its format. Out: the messages of a dialogue, or the reason why the row is
not one.
"""

import itertools
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ivl_jax.data.preferences import CHOSEN, REJECTED, check_pair, read_hh, read_preference
from ivl_jax.data.row_fields import (
    ROLES,
    Message,
    RowError,
    UntrainedMessage,
    list_keys,
    read_optional_text,
    read_text,
    read_text_or_turns,
    read_turns,
    shorten,
)
from ivl_jax.extensions import load_extension
from ivl_jax.json_files import json_kind

__all__ = [
    "FORMATS",
    "ROLES",
    "Demonstration",
    "Message",
    "ParsedRow",
    "RowError",
    "RowFormat",
    "SourceError",
    "UntrainedMessage",
    "check_templates",
    "fill_template",
    "find_format",
    "parse_row",
]


class Demonstration(NamedTuple):
    """A dialogue to train on, and where it came from."""

    messages: tuple[Message, ...]  # an optional system turn, then alternately user and assistant
    row_id: str  # "train.jsonl:17", file and line
    rejected: tuple[Message, ...] = ()  # of a preference: the same prompt with the worse answer


class ParsedRow(NamedTuple):
    """A row read as a dialogue."""

    messages: tuple[Message, ...]
    trimmed: bool  # turns before the first user's or after the last assistant's were left out
    rejected: tuple[Message, ...] = ()  # of a preference


class SourceError(ValueError):
    """A source of rows that cannot be read at all."""


class RowFormat(NamedTuple):
    """How the rows of a file are written."""

    name: str
    read: Callable[[Mapping[str, Any], Mapping[str, str]], Sequence[Message]]
    """(row, role → template) → the turns in order; raises `RowError` with the reason why the row
    is not a dialogue."""
    reads_system: bool = True
    """A row's field `system`, a text, goes before the turns."""
    reads_templates: bool = False
    """It needs the templates of user and assistant."""
    read_rejected: Callable[[Mapping[str, Any], Mapping[str, str]], Sequence[Message]] | None = None
    """Of preferences: as `read`, which gives the chosen dialogue, for the rejected one."""


def parse_row(row: Any, *, row_format: RowFormat, templates: Mapping[str, str]) -> ParsedRow:
    """Reads a row as a dialogue that ends with an assistant's turn.

    Args:
        row: The row as JSON gives it.
        row_format: An entry of `FORMATS`, or one of the user's own.
        templates: Where the format reads them, role to template over the row's fields, `{"user":
            "{question}", "assistant": "{answer}"}`; `{meta.title}` reads a field inside a field.

    Returns:
        The dialogue; of a row of preferences, both. Assistant turns before the first user turn, and
        turns after the last assistant turn, are left out, since there is nothing to learn from
        them. A turn in a list of turns may have a `weight`: 0 leaves it out of the loss, 1 is the
        default.

    Raises:
        RowError: The row is not a dialogue in this format.

    Example:
        >>> row = {"question": "What is 2 + 3?", "answer": "5"}
        >>> templates = {"user": "{question}", "assistant": "{answer}"}
        >>> parse_row(row, row_format=FORMATS["fields"], templates=templates).messages
        (Message(role='user', content='What is 2 + 3?'), Message(role='assistant', content='5'))
    """
    if not isinstance(row, Mapping):
        raise RowError(f"expected an object, got {json_kind(row)}")
    parsed = _parse(row, row_format, row_format.read, templates)
    if row_format.read_rejected is None:
        return parsed
    other = _parse(row, row_format, row_format.read_rejected, templates)
    chosen, rejected = check_pair(parsed.messages, other.messages)
    return ParsedRow(chosen, parsed.trimmed or other.trimmed, rejected)


def _parse(
    row: Mapping[str, Any], row_format: RowFormat, read: Any, templates: Mapping[str, str]
) -> ParsedRow:
    try:
        turns = list(read(row, templates))
        _check_messages(turns, row_format.name)
    except RowError:
        raise
    # A format of the user's own meets rows that its author did not think of.
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RowError(f"format {row_format.name}: {type(error).__name__}: {error}") from error
    system = read_optional_text(row, "system") if row_format.reads_system else ""
    if system and (not turns or turns[0].role != "system"):
        turns.insert(0, Message("system", system))
    return _checked(turns)


def _check_messages(turns: Sequence[Any], format_name: str) -> None:
    """An error where a format gives anything but messages."""
    for turn in turns:
        if not isinstance(turn, Message):
            raise RowError(f"format {format_name}: expected messages, got {json_kind(turn)}")
        if turn.role not in ROLES:
            raise RowError(f"format {format_name}: unknown role {shorten(turn.role)}")
        if not isinstance(turn.content, str):
            raise RowError(
                f"format {format_name}: the content is {json_kind(turn.content)}, expected text"
            )


def find_format(name: str) -> RowFormat:
    """Give a format.

    Args:
        name: A key of `FORMATS`, or `module:attribute` of a `RowFormat` that the user's own config
            or flag names.

    Returns:
        The format.

    Raises:
        ValueError: Neither.
    """
    return load_extension(name, FORMATS, RowFormat, where="format")


def check_templates(row_format: RowFormat, templates: Mapping[str, str]) -> None:
    """Checks that templates are given exactly where they are read, and that they are well formed.

    Raises:
        ValueError: A template is missing, not wanted or not readable.
    """
    name = row_format.name
    if not row_format.reads_templates:
        if any(templates.values()):
            raise ValueError(
                f'format = "{name}" reads no templates, got {_given(templates)}: leave them out, '
                'or set format = "fields"'
            )
        return
    missing = [role for role in ("user", "assistant") if not templates.get(role)]
    unknown = sorted(set(templates) - set(ROLES))
    if missing or unknown:
        raise ValueError(
            f'format = "{name}" needs user_template and assistant_template, for example '
            f'"{{question}}" and "{{answer}}", got {_given(templates) or "neither"}'
        )
    for role, template in templates.items():
        if template and not any(name for name in _template_parts(role, template)):
            raise ValueError(f"{role}_template: {template!r} names no field, as {{answer}} does")


def _given(templates: Mapping[str, str]) -> str:
    return ", ".join(f"{role}_template" for role, template in templates.items() if template)


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """Fills a template's `{name}` or `{outer.inner}` placeholders with a row's fields.

    Raises:
        RowError: A field is missing, or is neither text nor a number.
    """
    filled = []
    for literal, name, _, _ in string.Formatter().parse(template):
        filled.append(literal)
        if name is None:
            continue
        value: Any = row
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise RowError(f"no field {name!r}; the row has {list_keys(row)}")
            value = value[key]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"field {name!r} is {json_kind(value)}, expected text")
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(f"field {name!r} is {value}, expected text or a finite number")
        filled.append(str(value))
    return "".join(filled)


def _template_parts(role: str, template: str) -> list[str]:
    """The field names of a template; an error for anything but plain names."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{role}_template: {template!r}: {error}") from error
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name or "[" in name):
            raise ValueError(
                f"{role}_template: {template!r}: expected {{field}} or {{outer.inner}}, without "
                "formats or indices"
            )
    return [name for _, name, _, _ in parts if name]


def _read_sharegpt(row: Mapping[str, Any], _: Mapping[str, str]) -> list[Message]:
    """`conversations` of `from` and `value`."""
    return read_turns(row, "conversations", role_key="from", content_key="value")


def _read_messages(row: Mapping[str, Any], _: Mapping[str, str]) -> list[Message]:
    """`messages` of `role` and `content`."""
    return read_turns(row, "messages", role_key="role", content_key="content")


def _read_alpaca(row: Mapping[str, Any], _: Mapping[str, str]) -> list[Message]:
    """`instruction`, `input` and `output`."""
    if row.get("history"):
        raise RowError("field 'history' is not supported: use format messages")
    prompt, extra = read_text(row, "instruction"), read_optional_text(row, "input")
    return [
        Message("user", f"{prompt}\n\n{extra}" if extra else prompt),
        Message("assistant", read_text(row, "output")),
    ]


def _read_prompt_completion(row: Mapping[str, Any], _: Mapping[str, str]) -> list[Message]:
    """`prompt` and `completion`, texts or lists of messages."""
    prompt = read_text_or_turns(row, "prompt", role="user")
    return [*prompt, *read_text_or_turns(row, "completion", role="assistant")]


def _read_fields(row: Mapping[str, Any], templates: Mapping[str, str]) -> list[Message]:
    """Fields of any name, put into templates."""
    return [
        Message(role, fill_template(templates[role], row)) for role in ROLES if templates.get(role)
    ]


FORMATS = {
    one.name: one
    for one in (
        RowFormat("sharegpt", _read_sharegpt),
        RowFormat("messages", _read_messages),
        RowFormat("alpaca", _read_alpaca),
        RowFormat("prompt_completion", _read_prompt_completion),
        RowFormat("fields", _read_fields, reads_system=False, reads_templates=True),
        RowFormat(
            "preference",
            lambda row, _: read_preference(row, CHOSEN),
            read_rejected=lambda row, _: read_preference(row, REJECTED),
        ),
        RowFormat(
            "hh",
            lambda row, _: read_hh(row, CHOSEN),
            read_rejected=lambda row, _: read_hh(row, REJECTED),
        ),
    )
}


def _checked(turns: list[Message]) -> ParsedRow:
    """The part of a dialogue to train on; an error if its turns are out of order."""
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = turns[len(system) :]
    first_user = next((i for i, turn in enumerate(rest) if turn.role == "user"), len(rest))
    last_answer = max((i for i, turn in enumerate(rest) if turn.role == "assistant"), default=-1)
    if any(turn.role == "system" for turn in rest):
        raise RowError("a system turn that is not the first turn")
    if last_answer < first_user:
        raise RowError("no assistant turn that answers a user turn")
    kept = rest[first_user : last_answer + 1]
    for position, (turn, following) in enumerate(itertools.pairwise(kept)):
        if turn.role == following.role:
            raise RowError(f"two {turn.role} turns in a row (turns {position} and {position + 1})")
    for position, turn in enumerate(kept):
        if turn.role == "assistant" and not turn.content.strip():
            raise RowError(f"the assistant's turn {position} is empty")
    if not any(turn.weight for turn in kept if turn.role == "assistant"):
        raise RowError("every assistant's turn has weight 0: nothing to learn from")
    for position, turn in enumerate((*system, *kept)):
        if any("\ud800" <= character <= "\udfff" for character in turn.content):
            raise RowError(f"turn {position} contains a lone surrogate, which is not a character")
    return ParsedRow(messages=(*system, *kept), trimmed=len(kept) < len(rest))
