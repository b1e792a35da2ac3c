"""Decides which dialogues share a batch row.

In: the positions that each dialogue takes and that a row has. Out: the dialogues of each row.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class RowPlan(NamedTuple):
    """The dialogues of each row."""

    dialogues: Int64[np.ndarray, "N"]  # indices, those of one row next to each other
    starts: Int64[np.ndarray, "R1"]  # where each row begins in `dialogues`, and the end of the last

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.starts) - 1

    def row(self, index: int) -> Int64[np.ndarray, "n"]:
        """Returns the dialogues of a row, in order."""
        return self.dialogues[self.starts[index] : self.starts[index + 1]]


def one_per_row(count: int) -> RowPlan:
    """Returns the plan with one of `count` dialogues per row."""
    return RowPlan(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: Int64[np.ndarray, "N"], *, row_length: int, seed: int) -> RowPlan:
    """Packs dialogues into rows by best fit, longest dialogues first.

    The plan depends only on the arguments, not on the epoch: the number of rows, and so the number
    of steps per epoch, is known before training. Dialogues of equal length are combined at random,
    by the seed.

    Args:
        lengths: Positions that each dialogue takes, at most `row_length`.
        row_length: Positions of a row.
        seed: Seed of the draw.

    Returns:
        The plan; every dialogue is in exactly one row.

    Example:
        >>> plan = pack(np.array([3, 5, 2, 4]), row_length=7, seed=0)
        >>> [plan.row(i).tolist() for i in range(plan.rows)]
        [[1, 2], [3, 0]]
    """
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    order = drawn[np.argsort(-lengths[drawn], kind="stable")]
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by positions left
    spaces = 0  # bit s is set where some row has s positions left
    for dialogue in order.tolist():
        length = int(lengths[dialogue])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(dialogue)
        by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return RowPlan(
        dialogues=np.asarray([dialogue for row in rows for dialogue in row], np.int64),
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )
