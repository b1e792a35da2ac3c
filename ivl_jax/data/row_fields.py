"""Reads the fields of a row: texts, turns and lists of turns.

In: a row as JSON or TFDS gives it. Out: messages, or the reason why a field cannot be read.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ivl_jax.json_files import json_kind
from ivl_jax.text_files import shortened

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


class RowError(ValueError):
    """The reason why a row is not a dialogue."""


def read_turns(
    row: Mapping[str, Any], field: str, *, role_key: str, content_key: str
) -> list[Message]:
    """A row's list of turns."""
    if field not in row:
        raise RowError(f"no field {field!r}; the row has {list_keys(row)}")
    return to_messages(row[field], field, role_key=role_key, content_key=content_key)


def to_messages(value: Any, field: str, *, role_key: str, content_key: str) -> list[Message]:
    """A list of turns as messages; `field` names it in errors."""
    if isinstance(value, Mapping):  # TFDS stores a list of records as a record of lists
        value = _records(value, field)
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r} is {json_kind(value)}, expected a non-empty list of turns")
    messages = []
    for position, turn in enumerate(value):
        where = f"{field}[{position}]"
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            found = list_keys(turn) if isinstance(turn, Mapping) else json_kind(turn)
            raise RowError(f"{where}: expected {role_key!r} and {content_key!r}, got {found}")
        role = _ROLE_NAMES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise RowError(f"{where}: unknown {role_key} {shorten(turn[role_key])}")
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise RowError(f"{where}: the weight is {shorten(weight)}, expected 0 or 1")
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
        counted = ", ".join(f"{count} in {shorten(name)}" for name, count in lengths.items())
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


def read_text_or_turns(row: Mapping[str, Any], field: str, *, role: str) -> list[Message]:
    """A field that is the text of one role, or a list of messages."""
    if isinstance(row.get(field), list):
        return to_messages(row[field], field, role_key="role", content_key="content")
    return [Message(role, read_text(row, field))]


def read_text(row: Mapping[str, Any], field: str) -> str:
    """A field that must be text."""
    if field not in row:
        raise RowError(f"no field {field!r}; the row has {list_keys(row)}")
    if not isinstance(row[field], str):
        raise RowError(f"field {field!r} is {json_kind(row[field])}, expected text")
    return row[field]


def read_optional_text(row: Mapping[str, Any], field: str) -> str:
    """A field that may be absent or null; blank text counts as absent."""
    text = "" if row.get(field) is None else read_text(row, field)
    return text if text.strip() else ""


def list_keys(row: Mapping[str, Any]) -> str:
    """The fields of a row, for a message."""
    return ", ".join(shorten(key) for key in list(row)[:10]) or "no fields"


def shorten(value: Any) -> str:
    """A value as shown in an error message: short, on one line."""
    if not isinstance(value, str | int | float):
        return json_kind(value)
    return shortened(value)
