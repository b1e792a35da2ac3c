"""Batches hold every dialogue once an epoch, in an order that can be saved and shared out."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import jax
import numpy as np
import pytest

from ivl_jax.data.batching import (
    Batch,
    ResumeError,
    TrainIterator,
    lay_out_rows,
    make_eval_batches,
    make_train_iterator,
)
from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.demonstrations import Demonstration
from ivl_jax.data.tokenized import TokenizedDemonstrations, tokenize_demonstrations

Segment = tuple[tuple[int, ...], tuple[bool, ...]]


@pytest.fixture(scope="module")
def tokenized(byte_tokenizer: Any, arithmetic: list[Demonstration]) -> TokenizedDemonstrations:
    chat = make_chat_format(byte_tokenizer, template="plain")
    return tokenize_demonstrations(arithmetic, chat, sequence_length=96, cache_dir=None)


def _train(tokenized: TokenizedDemonstrations, **options: Any) -> TrainIterator:
    defaults = {"batch_size": 4, "pad_id": 256, "packing": True, "seed": 3}
    return make_train_iterator(tokenized, **{**defaults, **options})


def _evaluation(tokenized: TokenizedDemonstrations, **options: Any) -> Any:
    defaults = {"batch_size": 4, "pad_id": 256, "packing": True}
    return make_eval_batches(tokenized, **{**defaults, **options})


def _segments(batches: Iterable[Batch]) -> Counter:
    """The dialogues that batches hold, put together again from their segments."""
    found: Counter = Counter()
    for batch in batches:
        for tokens, targets, mask, positions, segments in zip(*batch[:5], strict=True):
            for segment in range(1, segments.max(initial=0) + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(inside.sum()))
                assert targets[inside][:-1].tolist() == tokens[inside][1:].tolist()
                whole = (*tokens[inside].tolist(), int(targets[inside][-1]))
                found[whole, (False, *mask[inside].tolist())] += 1
    return found


def _dialogues(tokenized: TokenizedDemonstrations) -> Counter:
    return Counter(
        (tuple(tokens.tolist()), tuple(loss_mask.tolist())) for tokens, loss_mask in tokenized
    )


def _equal(first: Batch, second: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_epoch_holds_every_dialogue_exactly_once(
    tokenized: TokenizedDemonstrations, packing: bool, batch_size: int
) -> None:
    iterator = _train(tokenized, packing=packing, batch_size=batch_size)
    expected = _dialogues(tokenized)
    for _ in range(3):
        epoch = list(islice(iterator, iterator.steps_per_epoch))
        assert _segments(epoch) == expected
        assert all(batch.tokens.shape == (batch_size, 96) for batch in epoch)
    evaluation = _evaluation(tokenized, packing=packing, batch_size=batch_size)
    assert _segments(evaluation) == expected
    assert len(list(evaluation)) == len(evaluation)


def test_packing_shares_rows_and_padding_does_not(tokenized: TokenizedDemonstrations) -> None:
    packed, padded = (_evaluation(tokenized, packing=packing) for packing in (True, False))
    assert len(packed) < len(padded) == 8
    assert max(batch.segment_ids.max() for batch in packed) > 1
    assert max(batch.segment_ids.max() for batch in padded) == 1


def test_padding_counts_for_nothing_though_it_is_the_end_of_sequence(
    tokenized: TokenizedDemonstrations, byte_tokenizer: Any
) -> None:
    eos = byte_tokenizer.eos_token_id
    for batch in _evaluation(tokenized, pad_id=eos):
        padding = ~batch.token_mask
        assert padding.any()
        assert (batch.tokens[padding] == eos).all()
        assert (batch.targets[padding] == eos).all()
        assert not batch.loss_mask[padding].any()
        assert not batch.positions[padding].any()
        assert (batch.targets[batch.loss_mask] == eos).any(), "the end of turn is learned"


def test_the_last_batch_is_made_up_with_empty_rows(tokenized: TokenizedDemonstrations) -> None:
    *_, last = _evaluation(tokenized, packing=False)
    assert last.segment_ids.any(axis=1).tolist() == [True, True, False, False]
    assert _evaluation(tokenized, packing=False).row_ids(7)[1:] == [["sums.jsonl:30"], [], []]


def test_the_order_follows_from_the_seed_and_changes_every_epoch(
    tokenized: TokenizedDemonstrations,
) -> None:
    iterator = _train(tokenized, packing=False)
    steps = iterator.steps_per_epoch
    orders = [
        [iterator.row_ids(epoch * steps + step) for step in range(steps)] for epoch in range(3)
    ]
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]
    again, other = _train(tokenized, packing=False), _train(tokenized, packing=False, seed=4)
    assert [again.row_ids(step) for step in range(steps)] == orders[0]
    assert [other.row_ids(step) for step in range(steps)] != orders[0]
    for _ in range(2 * steps):
        assert _equal(next(iterator), next(again))


@pytest.mark.parametrize("packing", [True, False])
def test_processes_share_out_the_same_global_batch(
    tokenized: TokenizedDemonstrations, packing: bool
) -> None:
    whole = _train(tokenized, packing=packing)
    for count in (2, 4):
        parts = [
            _train(tokenized, packing=packing, process_index=index, process_count=count)
            for index in range(count)
        ]
        assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
        for step in range(whole.steps_per_epoch + 2):
            ids = [row for part in parts for row in part.row_ids(step)]
            assert ids == whole.row_ids(step)
            together = [next(part) for part in parts]
            expected = whole._packed.batch(whole._order[step])
            joined = jax.tree.map(lambda *parts: np.concatenate(parts), *together)
            assert _equal(joined, expected)
        evaluations = [
            _evaluation(tokenized, packing=packing, process_index=index, process_count=count)
            for index in range(count)
        ]
        assert len({len(evaluation) for evaluation in evaluations}) == 1
        everything = sum((_segments(evaluation) for evaluation in evaluations), Counter())
        assert everything == _dialogues(tokenized)


@pytest.mark.parametrize("taken", [0, 1, 5, 8, 9, 21])
def test_a_saved_position_resumes_bit_for_bit(
    tokenized: TokenizedDemonstrations, taken: int
) -> None:
    iterator = _train(tokenized, packing=False)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = _train(tokenized, packing=False)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for _ in range(10):
        assert _equal(next(iterator), next(resumed))


def test_a_position_may_be_resumed_by_another_number_of_processes(
    tokenized: TokenizedDemonstrations,
) -> None:
    iterator = _train(tokenized)
    next(iterator)
    half = _train(tokenized, process_index=1, process_count=2)
    half.set_state(iterator.get_state())
    whole, part = next(iterator), next(half)
    assert part.tokens.tolist() == whole.tokens[2:].tolist()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"seed": 5}, "seed was 3 and is 5"),
        ({"packing": False}, "packing was True and is False"),
    ],
)
def test_a_position_of_another_packing_is_refused(
    tokenized: TokenizedDemonstrations, change: dict[str, Any], named: str
) -> None:
    state = _train(tokenized).get_state()
    with pytest.raises(ResumeError, match=named):
        _train(tokenized, **change).set_state(state)


def test_a_position_in_other_demonstrations_is_refused(
    tokenized: TokenizedDemonstrations, byte_tokenizer: Any, arithmetic: list[Demonstration]
) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")
    fewer = tokenize_demonstrations(arithmetic[1:], chat, sequence_length=96, cache_dir=None)
    with pytest.raises(ResumeError, match="demonstrations and tokens was"):
        _train(fewer).set_state(_train(tokenized).get_state())


def test_row_ids_name_the_demonstrations_of_a_batch(
    tokenized: TokenizedDemonstrations,
) -> None:
    iterator = _train(tokenized)
    by_id = {tokenized.row_id(index): tokenized[index] for index in range(len(tokenized))}
    for step in range(2 * iterator.steps_per_epoch):
        expected = lay_out_rows(
            [[by_id[row_id] for row_id in row] for row in iterator.row_ids(step)],
            sequence_length=96,
            pad_id=256,
        )
        assert _equal(next(iterator), expected)


def test_a_limited_evaluation_draws_the_same_rows_always(
    tokenized: TokenizedDemonstrations,
) -> None:
    limited = _evaluation(tokenized, packing=False, max_rows=6)
    assert len(limited) == 2
    rows = limited.row_ids(0) + limited.row_ids(1)
    assert rows == [*_evaluation(tokenized, packing=False, max_rows=6).row_ids(0), *rows[4:]]
    assert len({row[0] for row in rows if row}) == 6
    assert rows[:6] != [[f"sums.jsonl:{line}"] for line in range(1, 7)], "a draw, not the first"
    assert len(_evaluation(tokenized, packing=False, max_rows=30)) == 8
    assert len(_evaluation(tokenized, packing=False, max_rows=99)) == 8


def test_processes_that_do_not_divide_the_batch_are_an_error(
    tokenized: TokenizedDemonstrations,
) -> None:
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes"):
        _train(tokenized, process_count=3)
    with pytest.raises(ValueError, match="below their number"):
        _evaluation(tokenized, process_index=2, process_count=2)
