"""Rows are filled well, hold every dialogue once, and depend on nothing but lengths and seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_jax.data.packing import one_per_row, pack

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=80).map(np.asarray)


@settings(derandomize=True, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5))
def test_every_dialogue_stands_in_one_row_that_holds_it(lengths: np.ndarray, seed: int) -> None:
    plan = pack(lengths, row_length=64, seed=seed)
    rows = [plan.row(index) for index in range(plan.rows)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= 64 for row in rows)


@settings(derandomize=True, deadline=None)
@given(lengths=LENGTHS)
def test_no_two_rows_would_fit_into_one(lengths: np.ndarray) -> None:
    plan = pack(lengths, row_length=64, seed=0)
    used = sorted(int(lengths[plan.row(index)].sum()) for index in range(plan.rows))
    assert len(used) < 2 or used[0] + used[1] > 64


def test_typical_lengths_leave_little_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 20_000).astype(np.int64).clip(1, 1024)
    plan = pack(lengths, row_length=1024, seed=0)
    assert lengths.sum() / (plan.rows * 1024) > 0.99


def test_the_seed_decides_which_equals_meet() -> None:
    lengths = np.full(64, 8)
    first, again, other = (pack(lengths, row_length=16, seed=seed) for seed in (1, 1, 2))
    assert first.dialogues.tolist() == again.dialogues.tolist()
    assert first.dialogues.tolist() != other.dialogues.tolist()
    assert first.rows == other.rows == 32


@pytest.mark.parametrize("count", [1, 4])
def test_one_per_row_packs_nothing(count: int) -> None:
    plan = one_per_row(count)
    assert [plan.row(index).tolist() for index in range(plan.rows)] == [[i] for i in range(count)]
