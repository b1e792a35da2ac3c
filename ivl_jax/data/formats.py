"""Reads one row of a demonstrations file as a dialogue.

In: a row as a dict and its format. Out: the messages of a dialogue, or the reason why the row is
not one.
"""

import itertools
import math
import string
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from ivl_jax.json_files import json_kind

Format = Literal["sharegpt", "messages", "alpaca", "prompt_completion", "fields"]

_SHOWN_CHARACTERS = 60  # of a value in an error message

ROLES = ("system", "user", "assistant")
_ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class Message(NamedTuple):
    """One turn of a dialogue."""

    role: str  # "system", "user" or "assistant"
    content: str

    weight = 1  # of an assistant's turn in the loss


class UntrainedMessage(Message):
    """An assistant's turn that is read like the others, but left out of the loss."""

    weight = 0


class Demonstration(NamedTuple):
    """A dialogue to train on, and where it came from."""

    messages: tuple[Message, ...]  # an optional system turn, then alternately user and assistant
    row_id: str  # "train.jsonl:17", file and line


class ParsedRow(NamedTuple):
    """A row read as a dialogue."""

    messages: tuple[Message, ...]
    trimmed: bool  # turns before the first user's or after the last assistant's were left out


class RowError(ValueError):
    """The reason why a row is not a dialogue."""


class SourceError(ValueError):
    """A source of rows that cannot be read at all."""


def parse_row(row: Any, *, row_format: Format, templates: Mapping[str, str]) -> ParsedRow:
    """Reads a row as a dialogue that ends with an assistant's turn.

    Args:
        row: The row as JSON gives it.
        row_format: `sharegpt` (`conversations` of `from` and `value`), `messages` (`messages` of
            `role` and `content`), `alpaca` (`instruction`, `input`, `output`), `prompt_completion`
            (`prompt` and `completion`, texts or lists of messages) or `fields` (the templates). All
            but `fields` read a `system` text where the row has one.
        templates: With `fields`, role to template over the row's fields, `{"user": "{question}",
            "assistant": "{answer}"}`; `{meta.title}` reads a nested field.

    Returns:
        The dialogue. Assistant turns before the first user turn, and turns after the last assistant
        turn, are left out, since there is nothing to learn from them. A turn in a list of turns may
        have a `weight`: 0 leaves it out of the loss, 1 is the default.

    Raises:
        RowError: The row is not a dialogue in this format.

    Example:
        >>> row = {"question": "What is 2 + 3?", "answer": "5"}
        >>> templates = {"user": "{question}", "assistant": "{answer}"}
        >>> parse_row(row, row_format="fields", templates=templates).messages
        (Message(role='user', content='What is 2 + 3?'), Message(role='assistant', content='5'))
    """
    if not isinstance(row, Mapping):
        raise RowError(f"expected an object, got {json_kind(row)}")
    match row_format:
        case "sharegpt":
            turns = _turns(row, "conversations", role_key="from", content_key="value")
        case "messages":
            turns = _turns(row, "messages", role_key="role", content_key="content")
        case "alpaca":
            if row.get("history"):
                raise RowError("field 'history' is not supported: use format messages")
            prompt, extra = _text(row, "instruction"), _optional_text(row, "input")
            turns = [
                Message("user", f"{prompt}\n\n{extra}" if extra else prompt),
                Message("assistant", _text(row, "output")),
            ]
        case "prompt_completion":
            turns = [
                *_text_or_turns(row, "prompt", role="user"),
                *_text_or_turns(row, "completion", role="assistant"),
            ]
        case "fields":
            turns = [
                Message(role, fill_template(templates[role], row))
                for role in ROLES
                if templates.get(role)
            ]
    system = "" if row_format == "fields" else _optional_text(row, "system")
    if system and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    return _checked(turns)


def check_templates(row_format: str, templates: Mapping[str, str]) -> None:
    """Checks that templates are given exactly with `fields`, and that they are well formed.

    Raises:
        ValueError: The format is unknown, or a template is missing, not expected or malformed.
    """
    if row_format not in get_args(Format):
        raise ValueError(
            f"format: expected one of {', '.join(get_args(Format))}, got {row_format!r}"
        )
    if row_format != "fields":
        if any(templates.values()):
            raise ValueError(f"templates are used only with format 'fields', got {row_format!r}")
        return
    missing = [role for role in ("user", "assistant") if not templates.get(role)]
    unknown = sorted(set(templates) - set(ROLES))
    if missing or unknown:
        raise ValueError(
            f"templates: expected user, assistant and optionally system, got {sorted(templates)}"
        )
    for role, template in templates.items():
        if template and not any(name for name in _template_parts(role, template)):
            raise ValueError(f"template of {role}: {template!r} has no field such as {{answer}}")


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
                raise RowError(f"no field {name!r}; the row has {_keys(row)}")
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
        raise ValueError(f"template of {role}: {template!r}: {error}") from error
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name or "[" in name):
            raise ValueError(
                f"template of {role}: {template!r}: expected {{field}} or {{outer.inner}}, without "
                "formats or indices"
            )
    return [name for _, name, _, _ in parts if name]


def _turns(row: Mapping[str, Any], field: str, *, role_key: str, content_key: str) -> list[Message]:
    """A row's list of turns."""
    if field not in row:
        raise RowError(f"no field {field!r}; the row has {_keys(row)}")
    return _messages(row[field], field, role_key=role_key, content_key=content_key)


def _messages(value: Any, field: str, *, role_key: str, content_key: str) -> list[Message]:
    if isinstance(value, Mapping):  # TFDS stores a list of records as a record of lists
        value = _records(value, field)
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r} is {json_kind(value)}, expected a non-empty list of turns")
    messages = []
    for position, turn in enumerate(value):
        where = f"{field}[{position}]"
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            found = _keys(turn) if isinstance(turn, Mapping) else json_kind(turn)
            raise RowError(f"{where}: expected {role_key!r} and {content_key!r}, got {found}")
        role = _ROLE_NAMES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise RowError(f"{where}: unknown {role_key} {_shown(turn[role_key])}")
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise RowError(f"{where}: the weight is {_shown(weight)}, expected 0 or 1")
        untrained = role == "assistant" and weight == 0
        kind = UntrainedMessage if untrained else Message
        messages.append(kind(role, _content(turn[content_key], where)))
    return messages


def _records(columns: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """A record of lists as a list of records."""
    wrong = [name for name, column in columns.items() if not isinstance(column, list | tuple)]
    if wrong or not columns:
        raise RowError(f"field {field!r} is an object, expected a list of turns")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{count} in {_shown(name)}" for name, count in lengths.items())
        raise RowError(f"field {field!r}: its lists differ in length: {counted}")
    return [
        dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)
    ]


def _content(value: Any, where: str) -> str:
    """A turn's text, which may be a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise RowError(f"{where}: the content is {json_kind(value)}, expected text")


def _text_or_turns(row: Mapping[str, Any], field: str, *, role: str) -> list[Message]:
    """A field that is the text of one role, or a list of messages."""
    if isinstance(row.get(field), list):
        return _messages(row[field], field, role_key="role", content_key="content")
    return [Message(role, _text(row, field))]


def _text(row: Mapping[str, Any], field: str) -> str:
    """A field that must be text."""
    if field not in row:
        raise RowError(f"no field {field!r}; the row has {_keys(row)}")
    if not isinstance(row[field], str):
        raise RowError(f"field {field!r} is {json_kind(row[field])}, expected text")
    return row[field]


def _optional_text(row: Mapping[str, Any], field: str) -> str:
    """A field that may be absent or null; blank text counts as absent."""
    text = "" if row.get(field) is None else _text(row, field)
    return text if text.strip() else ""


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


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(_shown(key) for key in list(row)[:10]) or "no fields"


def _shown(value: Any) -> str:
    """A value as shown in an error message: short, on one line."""
    if not isinstance(value, str | int | float):
        return json_kind(value)
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
