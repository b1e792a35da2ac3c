"""How a field of a config dataclass appears on the command line and in TOML.

In: field types. Out: annotated field types, which `ivl_jax.config.files` and
`ivl_jax.command_line.flags` read. tyro has markers of its own, but importing it takes 0.15 s.
"""

from typing import Annotated, TypeVar

_T = TypeVar("_T")


class Marker:
    """A mark on a field's type, compared by identity."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


INLINE = Marker("INLINE")
REPEATABLE = Marker("REPEATABLE")
NO_FLAG = Marker("NO_FLAG")

Inline = Annotated[_T, INLINE]
"""The fields of this dataclass appear among those around it: `--base`, not `--model.base`."""

Repeatable = Annotated[_T, REPEATABLE]
"""The flag takes one value and is repeated for more: `--value A --value B`."""

NoFlag = Annotated[_T, NO_FLAG]
"""Set from Python only."""


def is_marked(field_type: object, marker: Marker) -> bool:
    """Return whether a field's type carries a marker."""
    return marker in getattr(field_type, "__metadata__", ())
