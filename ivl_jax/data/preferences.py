"""Reads rows of preferences: two answers to one prompt, of which one is preferred.

In: a row as a dict. Out: the chosen dialogue or the rejected one, with the same prompt; only the
answer is trained on.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ivl_jax.data.row_fields import (
    Message,
    RowError,
    UntrainedMessage,
    list_keys,
    read_text,
    read_text_or_turns,
    shorten,
    to_messages,
)

CHOSEN, REJECTED = "chosen", "rejected"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_preference(row: Mapping[str, Any], answer: str) -> list[Message]:
    """Reads `prompt`, `chosen` and `rejected`, as TRL and UltraFeedback write them.

    Args:
        row: `prompt` is a text or a list of messages; each answer is a text, a list with the
            answer's message, or a whole dialogue that begins with the prompt, perhaps after a
            system turn of its own. Without `prompt`, both answers are whole dialogues.
        answer: `chosen` or `rejected`.

    Returns:
        The dialogue that ends with that answer.

    Raises:
        RowError: A field is absent or has another form, or a dialogue does not begin with the
            prompt.
    """
    turns = read_text_or_turns(row, answer, role="assistant")
    is_dialogue = any(turn.role == "user" for turn in turns)
    if row.get("prompt") in (None, "", []):
        if is_dialogue:
            return turns
        found = "field 'prompt' is empty" if "prompt" in row else "no field 'prompt'"
        raise RowError(
            f"{found}, and {answer!r} is not a whole dialogue; the row has {list_keys(row)}"
        )
    prompt = read_text_or_turns(row, "prompt", role="user")
    if not is_dialogue:
        return [*prompt, *turns]
    if not _begins_with(turns, prompt):
        raise RowError(
            f"{answer!r} is a whole dialogue that does not begin with 'prompt': it begins with "
            f"{_first_words(turns)}, 'prompt' with {_first_words(prompt)}"
        )
    return turns


def _begins_with(dialogue: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether a dialogue repeats a prompt, but for white space and a system turn of its own."""
    if dialogue[0].role == "system" and prompt[0].role != "system":
        dialogue = dialogue[1:]
    begins = [[(turn.role, turn.content.strip()) for turn in turns] for turns in (dialogue, prompt)]
    return begins[0][: len(prompt)] == begins[1]


def _first_words(turns: Sequence[Message]) -> str:
    """The first turn as a message shows it."""
    return f"the {turns[0].role}'s {shorten(turns[0].content)}"


def read_hh(row: Mapping[str, Any], answer: str) -> list[Message]:
    r"""Reads `chosen` and `rejected` as Anthropic's HH-RLHF writes them.

    Each is one text, "\n\nHuman: …\n\nAssistant: …".

    Args:
        row: The row.
        answer: `chosen` or `rejected`.

    Returns:
        The dialogue.

    Raises:
        RowError: The text is not of that form.
    """
    before, *parts = _HH_TURN.split(read_text(row, answer))
    if before.strip() or not parts:
        raise RowError(f"field {answer!r} does not begin with a turn '\\n\\nHuman:'")
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    turns = [
        {"role": role, "content": content.strip()}
        for role, content in zip(roles, parts[1::2], strict=True)
    ]
    return to_messages(turns, answer, role_key="role", content_key="content")


def check_pair(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Checks that two dialogues differ in their last turn only, and leaves the rest untrained.

    Args:
        chosen: A dialogue that ends with the assistant's answer.
        rejected: Likewise.

    Returns:
        Both, in which only the last turn counts in the loss.

    Raises:
        RowError: The prompts differ, or the answers are equal.
    """
    if tuple(chosen[:-1]) != tuple(rejected[:-1]):
        raise RowError(
            f"'chosen' ({len(chosen)} turns) and 'rejected' ({len(rejected)}) answer different "
            "prompts: all turns but the last must be equal"
        )
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise RowError("'chosen' and 'rejected' are the same answer: nothing to prefer")
    prompt = tuple(
        UntrainedMessage(*turn) if turn.role == "assistant" else turn for turn in chosen[:-1]
    )
    return (*prompt, chosen[-1]), (*prompt, rejected[-1])
