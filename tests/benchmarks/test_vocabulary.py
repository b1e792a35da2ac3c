"""The peer of the vocabulary benchmark does the same work as what it is compared with."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.vocabulary import cell_by_cell
from ivl_jax.vocabulary.dtw import count_coaligned


def test_the_loop_over_cells_counts_the_same_pairs() -> None:
    random = np.random.default_rng(0)
    strings = ["".join(random.choice(list("abc"), random.integers(0, 4))) for _ in range(15)]
    value_rows, base_rows = (
        [random.integers(0, 15, n).astype(np.int32) for n in random.integers(1, 20, 12)]
        for _ in range(2)
    )
    side: Any = SimpleNamespace(strings=strings)
    counts = count_coaligned(
        value_rows,
        base_rows,
        value_strings=strings,
        base_strings=strings,
        progress=lambda done: None,
    )
    expected = {(int(b), int(v)): amount for b, v, amount in zip(*counts, strict=True)}
    assert cell_by_cell(side, side, base_rows, value_rows) == expected
