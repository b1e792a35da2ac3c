"""Prompts as callers give them: one or several, in any form whose meaning is plain.

In: a text, token ids or a dialogue, or several of them. Out: texts, lists of token ids, lists of
`Message`s; or a TypeError that says what is expected.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ivl_jax.data.formats import ROLES, Message

Dialogue = Sequence[Message | Mapping[str, str]]
"""Messages in turn, the last one the user's: `Message`s, or {"role": …, "content": …} each."""
Prompt = str | Sequence[int] | np.ndarray | Dialogue
"""A text, token ids, or a dialogue."""
OnePrompt = str | Sequence[int] | Dialogue
"""A prompt, as type checkers tell it from several; an array may be either."""
PlainPrompt = str | list[int] | list[Message]
"""A prompt in its one form."""

_EXPECTED = (
    "expected a text, token ids, or a dialogue (a list of ivl_jax.Message or of "
    '{"role": "user", "content": "…"})'
)
_ROLES_EXPECTED = f"expected one of {', '.join(ROLES)}"


def is_one_prompt(given: Any) -> bool:
    """Say whether a single prompt was given, not several.

    Args:
        given: of the caller.

    Example:
        >>> is_one_prompt("Once"), is_one_prompt([1, 2]), is_one_prompt([Message("user", "Hi")])
        (True, True, True)
        >>> is_one_prompt(["Once"]), is_one_prompt([[1, 2]]), is_one_prompt([])
        (False, False, False)
    """
    if isinstance(given, str):
        return True
    first = next(iter(given), None) if _is_list(given) else None
    return isinstance(first, Message | Mapping) or _is_integer(first)


def plain_prompts(given: Any) -> list[PlainPrompt]:
    """Bring prompts into their one form.

    Args:
        given: one prompt, or several.

    Returns:
        One entry per prompt.

    Raises:
        TypeError: something else; names the place and says what is expected.
        ValueError: a message with a role that does not exist.
    """
    if is_one_prompt(given):
        return [plain_prompt(given)]
    if not _is_list(given):
        raise TypeError(f"prompts: {_EXPECTED}, or a list of prompts, got {_shown(given)}")
    return [plain_prompt(one, f"prompt {index}") for index, one in enumerate(given)]


def plain_prompt(given: Any, where: str = "the prompt") -> PlainPrompt:
    """Bring one prompt into its one form.

    Args:
        given: the prompt.
        where: what messages call it.

    Returns:
        The prompt.

    Raises:
        TypeError: it is not a prompt; says what is expected.
        ValueError: a message with a role that does not exist.
    """
    if isinstance(given, str):
        return given
    if not _is_list(given):
        raise TypeError(f"{where}: {_EXPECTED}, got {_shown(given)}")
    parts = list(given)
    if all(_is_integer(part) for part in parts):
        return [int(part) for part in parts]
    if not all(isinstance(part, Message | Mapping) for part in parts):
        strange = next(p for p in parts if not (_is_integer(p) or isinstance(p, Message | Mapping)))
        raise TypeError(f"{where}: {_EXPECTED}, got a list with {_shown(strange)}")
    return [_message(part, f"{where}, message {index}") for index, part in enumerate(parts)]


def _message(given: Message | Mapping[str, Any], where: str) -> Message:
    if isinstance(given, Mapping):
        if set(given) != {"role", "content"}:
            raise TypeError(
                f"{where}: expected the keys role and content, got {_shown(sorted(given))}"
            )
        given = Message(given["role"], given["content"])
    if not isinstance(given.content, str):
        raise TypeError(f"{where}: expected a text as content, got {_shown(given.content)}")
    if given.role not in ROLES:
        raise ValueError(f"{where}: {_ROLES_EXPECTED} as role, got {given.role!r}")
    return given


def _is_list(given: Any) -> bool:
    """Whether it may hold prompts or parts of one; a message is a tuple, but one thing.

    An iterator does not count: looking at its first item would take it away.
    """
    if isinstance(given, str | bytes | Message):
        return False
    return isinstance(given, Sequence) or (hasattr(given, "__array__") and np.ndim(given) > 0)


def _is_integer(given: Any) -> bool:
    if isinstance(given, np.ndarray) and given.ndim == 0:
        return np.issubdtype(given.dtype, np.integer)
    return isinstance(given, numbers.Integral) and not isinstance(given, bool)


def _shown(given: Any) -> str:
    text = repr(given)
    kind = type(given).__name__
    return f"{text[:57]}… ({kind})" if len(text) > 60 else f"{text} ({kind})"
