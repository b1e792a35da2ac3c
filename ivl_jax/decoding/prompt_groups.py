"""Which waiting prompts are read next, and how: several at once, or a long one block by block.

In: the waiting prompts' widths, in order. Out: a `PromptGroup`. What is computed between two steps
of the running rows is bounded here, and only here.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Rows that end before prompts are admitted, as a share of the batch. Reading the weights for one
# prompt costs about a step; letting k rows wait for k prompts costs, at L tokens a row and B rows,
# (k − 1) L / 2B² steps a prompt. At L = 128 the best k is B / 8. No row waits longer than until
# its free steps have cost as much as reading the weights once more: B of them.
_ROWS_A_REFILL = 8


def usual_group(rows: int) -> int:
    """Prompts that are read together, as a rule, beside the running rows of a batch.

    Args:
        rows: of the batch.

    Example:
        >>> usual_group(32), usual_group(4)
        (4, 1)
    """
    return max(1, rows // _ROWS_A_REFILL)


class PromptGroup(NamedTuple):
    """The prompts that are read next."""

    size: int
    """How many, from the first one on."""
    rows: int
    """Rows of the program that reads them: one number per width, so that few are compiled."""
    in_blocks: bool = False
    """Whether it is one prompt that is read block by block."""


def next_group(widths: Sequence[int], *, rows: int, block: int | None) -> PromptGroup:
    """Choose the prompts that are read next.

    Args:
        widths: tokens of the waiting prompts for which there is room, with padding, in order; at
            least one.
        rows: prompts that are read together, as a rule.
        block: tokens that may be read between two steps of the running rows, padding included;
            None: as many as the prompts have.

    Returns:
        The first prompts: more than `rows` where many wait and a block holds them, fewer where it
        does not. A prompt that no block holds comes alone.

    Example:
        >>> next_group([16, 100, 16], rows=4, block=None)
        PromptGroup(size=3, rows=4, in_blocks=False)
        >>> next_group([16, 100, 16], rows=4, block=128)
        PromptGroup(size=1, rows=4, in_blocks=False)
        >>> next_group([200, 16], rows=4, block=128)
        PromptGroup(size=1, rows=1, in_blocks=True)
    """
    if block is None:
        return PromptGroup(min(rows, len(widths)), rows)
    # Every group costs a step of rows that are not all there yet; twice as many, for few programs.
    while 2 * rows <= len(widths) and 2 * rows * max(widths[: 2 * rows]) <= block:
        rows *= 2
    for size in range(min(rows, len(widths)), 0, -1):
        room = min(rows, block // max(widths[:size]))
        if size <= room:
            return PromptGroup(size, room)
    return PromptGroup(1, 1, in_blocks=True)
