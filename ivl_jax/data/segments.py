"""Demonstrations as the segments of a batch row: one dialogue, or a chosen and a rejected one.

In: demonstrations and a chat format. Out: their tokens and loss masks, cut to what a row holds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ivl_jax.data.chat import ChatFormat, ChatTemplateError, EncodedDialogue
from ivl_jax.data.formats import Demonstration


class Segments(NamedTuple):
    """A demonstration in tokens."""

    parts: tuple[EncodedDialogue, ...]  # one; of a preference two, the chosen and the rejected
    was_cut: bool

    @property
    def is_useful(self) -> bool:
        """Whether every part has a target; the first token of a segment is never one."""
        return all(bool(part.loss_mask[1:].any()) for part in self.parts)

    @property
    def is_equal_pair(self) -> bool:
        """Whether both answers of a preference have the same tokens, so that none is preferred."""
        return len(self.parts) > 1 and np.array_equal(self.parts[0].tokens, self.parts[1].tokens)


def encode_segments(
    chat: ChatFormat,
    demonstrations: Sequence[Demonstration],
    *,
    sequence_length: int,
    beyond_limits_at_most: int | None = None,
) -> list[Segments | ChatTemplateError]:
    """Encodes demonstrations, and cuts those that are too long for a row to their beginning.

    Args:
        chat: The chat format.
        demonstrations: Dialogues, or preferences.
        sequence_length: Positions of a row. A segment of N tokens takes N − 1 of them. Of a
            preference, the longer part is cut first.
        beyond_limits_at_most: See `ChatFormat.encode_dialogues`.

    Returns:
        For each demonstration its segments, or why the template cannot render it.
    """
    sides = [[one.messages for one in demonstrations]]
    if demonstrations and demonstrations[0].rejected:
        sides.append([one.rejected for one in demonstrations])
    encoded = [
        chat.encode_dialogues(side, beyond_limits_at_most=beyond_limits_at_most) for side in sides
    ]
    found: list[Segments | ChatTemplateError] = []
    for parts in zip(*encoded, strict=False):
        error = next((part for part in parts if isinstance(part, ChatTemplateError)), None)
        dialogues = tuple(part for part in parts if isinstance(part, EncodedDialogue))
        found.append(error or _cut(dialogues, sequence_length))
    return found


def _cut(parts: tuple[EncodedDialogue, ...], sequence_length: int) -> Segments:
    room = sequence_length + len(parts)
    total = sum(len(part.tokens) for part in parts)
    kept: dict[int, EncodedDialogue] = {}
    # From the shortest on, each may have an even share of what is left.
    for left, index in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i].tokens))):
        share = room // (len(parts) - left)
        kept[index] = EncodedDialogue(*(array[:share] for array in parts[index]))
        room -= len(kept[index].tokens)
    cut = tuple(kept[index] for index in range(len(parts)))
    return Segments(cut, was_cut=sum(len(part.tokens) for part in cut) < total)
