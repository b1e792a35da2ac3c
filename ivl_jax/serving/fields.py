"""The fields of request bodies: one table per body, which the parser and the description share.

In: a table of fields. Out: a reader that takes each field of a body once and refuses what does not
fit, and the JSON schema of such bodies. So the description at `/openapi.json` says what the parser
does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ivl_jax.composed.strength_policies import STRENGTH_POLICIES
from ivl_jax.config import (
    LARGEST_LOGIT_BIAS,
    LARGEST_SCALE,
    LARGEST_STRENGTH,
    MOST_LOGIT_BIASES,
    SMALLEST_SCALE,
)
from ivl_jax.json_files import json_kind
from ivl_jax.serving.errors import invalid

Schema = dict[str, Any]
"""A JSON schema."""


class Kind(NamedTuple):
    """What a field may hold."""

    fits: Callable[[Any], bool]
    expected: str
    """In messages."""
    schema: Schema
    """In the description."""


class Field(NamedTuple):
    """One field of a body."""

    kind: Kind
    default: Any = None
    """Where it is not given, or null."""
    required: bool = False
    about: str = ""
    """For the description."""
    limits: Schema | None = None
    """What is checked later, beyond its kind, as JSON schema."""

    @property
    def schema(self) -> Schema:
        """Its JSON schema; an optional field may be null."""
        schema = {**self.kind.schema, **(self.limits or {})}
        if not self.required:
            schema = {"anyOf": [schema, {"type": "null"}]}
        return {**schema, "description": self.about} if self.about else schema


Table = Mapping[str, Field]
"""The fields of a body, by name."""


class BodyReader:
    """The fields of one body, each taken once.

    Args:
        body: of the request, parsed.
        table: the fields that it may have.

    Raises:
        ApiError: with status 400: it is not an object.
    """

    def __init__(self, body: Any, table: Table) -> None:
        if not isinstance(body, dict):
            raise invalid(f"the body must be a JSON object, got {json_kind(body)}")
        self._left = {name: value for name, value in body.items() if value is not None}
        self._table = table

    def take(self, name: str) -> Any:
        """Take a field; one that is null counts as not given.

        Args:
            name: a key of the table.

        Returns:
            Its value, or its default.

        Raises:
            ApiError: with status 400: it is missing, or does not fit.
        """
        field = self._table[name]
        if name not in self._left:
            if field.required:
                raise invalid(f"{name} is missing: expected {field.kind.expected}", name)
            return field.default
        value = self._left.pop(name)
        if not field.kind.fits(value):
            raise invalid(f"{name}: expected {field.kind.expected}, got {value!r:.100}", name)
        return value

    def refuse_others(
        self, *, ignored: Sequence[str] = (), neutral: Mapping[str, tuple[Any, ...]] | None = None
    ) -> None:
        """Refuse what has not been taken.

        Args:
            ignored: fields that change nothing.
            neutral: fields that cannot be honoured, and the values that ask for nothing.

        Raises:
            ApiError: with status 400; it names the field.
        """
        neutral = neutral or {}
        for name, value in self._left.items():
            if name in ignored or value in neutral.get(name, ()):
                continue
            if name in neutral:
                raise invalid(
                    f"{name} is not supported by this server: leave it out", name, "unsupported"
                )
            raise invalid(f"unknown field {name!r:.100}", name[:100], "unknown_field")


def body_schema(
    table: Table,
    *,
    ignored: Sequence[str] = (),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
) -> Schema:
    """The JSON schema of the bodies that a table describes.

    Args:
        table: the fields.
        ignored: as `BodyReader.refuse_others` takes them.
        neutral: likewise.

    Example:
        >>> schema = body_schema({"n": Field(COUNT, default=1)})
        >>> schema["properties"]["n"]["anyOf"][0]
        {'type': 'integer', 'minimum': 0, 'maximum': 2147483647}
        >>> schema["additionalProperties"]
        False
    """
    properties = {name: field.schema for name, field in table.items()}
    properties |= {name: {"description": "Changes nothing."} for name in ignored}
    for name, values in (neutral or {}).items():
        properties[name] = {"enum": [*values, None], "description": "Cannot be honoured."}
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name, field in table.items() if field.required],
        "additionalProperties": False,
    }


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether it is an integer that is not negative and fits 31 bits."""
    return _is_integer(value) and 0 <= value < 2**31


def _is_positive(value: Any) -> bool:
    return is_count(value) and value > 0


def as_float(value: float | int) -> float:
    """A number as a float; an integer that no float holds becomes infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_stop(value: Any) -> bool:
    return is_text(value) or (_is_list(value) and all(map(is_text, value)))


def is_token_list(value: Any) -> bool:
    """Whether it is a list of token ids that is not empty."""
    return _is_list(value) and len(value) > 0 and all(map(is_count, value))


def _is_prompt(value: Any) -> bool:
    if is_text(value) or is_token_list(value):
        return True
    each = value if _is_list(value) else []
    return bool(each) and (all(map(is_text, each)) or all(map(is_token_list, each)))


def _are_strengths(value: Any) -> bool:
    return _is_object(value) and all(map(_is_number, value.values()))


def _are_stream_options(value: Any) -> bool:
    # Obfuscation is padding against who counts bytes on the way; there is none here.
    known = ("include_usage", "include_obfuscation")
    return _is_object(value) and all(
        name in known and (given is None or _is_boolean(given)) for name, given in value.items()
    )


def _is_logit_bias(value: Any) -> bool:
    return _is_object(value) and all(map(_is_token_key, value)) and _are_strengths(value)


def _is_token_key(key: str) -> bool:
    """Whether a key of JSON is a token id as one writes it: digits, no leading zero."""
    return len(key) <= 10 and key.isascii() and key.isdecimal() and str(int(key)) == key


def _is_policy(value: Any) -> bool:
    return (
        _is_object(value)
        and set(value) <= {"name", "scale"}
        and is_text(value.get("name"))
        and _is_number(value.get("scale", 1))
    )


_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOKENS: Schema = {"type": "array", "items": _COUNT, "minItems": 1}
_TEXT: Schema = {"type": "string"}

COUNT = Kind(is_count, "an integer in [0, 2³¹)", _COUNT)
POSITIVE = Kind(_is_positive, "an integer in [1, 2³¹)", {**_COUNT, "minimum": 1})
SEED = Kind(
    _is_integer,
    "an integer in [0, 2³²)",
    {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
)
BOOLEAN = Kind(_is_boolean, "true or false", {"type": "boolean"})
STREAM_OPTIONS = Kind(
    _are_stream_options,
    "an object with include_usage: true or false",
    {
        "type": "object",
        "properties": {
            name: {"type": ["boolean", "null"]} for name in ("include_usage", "include_obfuscation")
        },
        "additionalProperties": False,
    },
)
STRENGTHS = Kind(
    _are_strengths,
    "an object from names of value networks to numbers",
    {
        "type": "object",
        "additionalProperties": {
            "type": "number",
            "minimum": -LARGEST_STRENGTH,
            "maximum": LARGEST_STRENGTH,
        },
    },
)
STRENGTH_POLICY = Kind(
    _is_policy,
    "an object of name and, perhaps, scale",
    {
        "type": "object",
        "properties": {
            "name": {"enum": list(STRENGTH_POLICIES)},
            "scale": {"type": "number", "minimum": SMALLEST_SCALE, "maximum": LARGEST_SCALE},
        },
        "required": ["name"],
        "additionalProperties": False,
    },
)
LOGIT_BIAS = Kind(
    _is_logit_bias,
    "an object from token ids to numbers",
    {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": {
            "type": "number",
            "minimum": -LARGEST_LOGIT_BIAS,
            "maximum": LARGEST_LOGIT_BIAS,
        },
        "maxProperties": MOST_LOGIT_BIASES,
    },
)
STOP = Kind(
    _is_stop,
    "a text, or a list of texts",
    {"anyOf": [{**_TEXT, "minLength": 1}, {"type": "array", "items": {**_TEXT, "minLength": 1}}]},
)
PROMPT = Kind(
    _is_prompt,
    "a text, a list of texts, a list of token ids, or a list of such lists",
    {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": _TEXT, "minItems": 1},
            _TOKENS,
            {"type": "array", "items": _TOKENS, "minItems": 1},
        ]
    },
)


def text(expected: str) -> Kind:
    """A string."""
    return Kind(is_text, expected, {"type": "string"})


def number(expected: str) -> Kind:
    """A number."""
    return Kind(_is_number, expected, {"type": "number"})


def items(expected: str, schema: Schema) -> Kind:
    """A list whose items are checked one by one."""
    return Kind(_is_list, expected, {"type": "array", "items": schema})
