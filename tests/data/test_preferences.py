"""Preferences: rows of a chosen and a rejected answer, from JSON to the segments of a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_jax.data.batching import make_train_iterator
from ivl_jax.data.chat import EncodedDialogue, make_chat_format
from ivl_jax.data.demonstrations import (
    DemonstrationSource,
    MalformedRowsError,
    store_demonstrations,
)
from ivl_jax.data.formats import FORMATS, RowError, parse_row
from ivl_jax.data.segments import _cut
from ivl_jax.data.tokenized import tokenize_demonstrations
from ivl_jax.tokenizer import load_tokenizer

QUESTION = {"role": "user", "content": "Q"}
TURNS = [QUESTION, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Why?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD, BAD = {"role": "assistant", "content": "Good"}, {"role": "assistant", "content": "Bad"}


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        ("preference", {"prompt": "Q", "chosen": "Good", "rejected": "Bad"}, ["Q"]),
        (
            "preference",
            {"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]},
            ["Q", "Yes", "Why?"],
        ),
        (
            "preference",
            {"prompt": "Q", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            ["Q"],
        ),
        ("preference", {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, ["Q", "Yes", "Why?"]),
        # UltraFeedback's prompt is the first message of its dialogues.
        (
            "preference",
            {"prompt": " Q ", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
            ["Q", "Yes", "Why?"],
        ),
        (
            "preference",
            {
                "prompt": "Q",
                "chosen": [SYSTEM, QUESTION, GOOD],
                "rejected": [SYSTEM, QUESTION, BAD],
            },
            ["Be brief.", "Q"],
        ),
        (
            "preference",
            {"prompt": None, "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            ["Q"],
        ),
        (
            "hh",
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: Yes\n\nHuman: Why?\n\nAssistant: Good",
                "rejected": "\n\nHuman: Q\n\nAssistant: Yes\n\nHuman: Why?\n\nAssistant: Bad",
            },
            ["Q", "Yes", "Why?"],
        ),
    ],
)
def test_published_forms_give_two_dialogues_of_one_prompt(name, row, prompt) -> None:
    parsed = parse_row(row, row_format=FORMATS[name], templates={})
    for turns, answer in ((parsed.messages, "Good"), (parsed.rejected, "Bad")):
        assert [turn.content for turn in turns] == [*prompt, answer]
        # The answer alone is trained on.
        trained = [turn.content for turn in turns if turn.role == "assistant" and turn.weight]
        assert trained == [answer]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "A"}, "the same answer"),
        ("preference", {"prompt": "Q", "chosen": "A\n", "rejected": " A"}, "the same answer"),
        (
            "preference",
            {"prompt": "P", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            "'chosen' is a whole dialogue .* begins with the user's .*Q.*, 'prompt' with .*P",
        ),
        (
            "preference",
            {"prompt": TURNS, "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
            "'chosen' is a whole dialogue that does not begin with 'prompt'",
        ),
        ("preference", {"prompt": "Q", "chosen": " ", "rejected": "A"}, "turn 1 is empty"),
        ("preference", {"prompt": "Q", "chosen": "A"}, "no field 'rejected'"),
        ("preference", {"chosen": "A", "rejected": "B"}, "no field 'prompt'"),
        ("preference", {"prompt": "Q", "chosen": 1, "rejected": "B"}, "'chosen' is a number"),
        (
            "preference",
            {"chosen": [QUESTION, GOOD], "rejected": [{**QUESTION, "content": "P"}, BAD]},
            "different prompts",
        ),
        ("hh", {"chosen": "Human: Q", "rejected": "x"}, "does not begin with a turn"),
        ("hh", {"chosen": [QUESTION, GOOD], "rejected": "x"}, "'chosen' is a list"),
    ],
)
def test_rows_that_prefer_nothing_are_refused_with_the_reason(name, row, said) -> None:
    with pytest.raises(RowError, match=said):
        parse_row(row, row_format=FORMATS[name], templates={})


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ([5, 9], 20, [5, 9]),
        ([5, 9], 10, [5, 7]),
        ([9, 5], 10, [7, 5]),
        ([9, 9], 10, [6, 6]),
        ([12], 10, [11]),
        ([11], 10, [11]),
    ],
)
def test_the_longer_answer_is_cut_first_and_a_row_holds_what_is_left(lengths, room, kept) -> None:
    parts = tuple(EncodedDialogue(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in lengths)
    cut = _cut(parts, room)
    assert [len(part.tokens) for part in cut.parts] == kept
    assert sum(kept) - len(kept) <= room
    assert cut.was_cut == (kept != lengths)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Forty preferences, two for each of twenty prompts."""

    def row(number: int) -> dict[str, Any]:
        answers = {"chosen": f"Yes, {number}.", "rejected": "No." * (1 + number % 4)}
        return {"prompt": f"Is it {number // 2}?", **answers}

    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
    return str(path)


def test_pairs_that_prefer_nothing_are_left_out_of_the_stored_rows_and_named(
    rows, tmp_path
) -> None:
    bad = [
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": " "},
        {"chosen": [QUESTION, GOOD], "rejected": [{**QUESTION, "content": "P"}, BAD]},
    ]
    with Path(rows).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bad)
    source = DemonstrationSource((rows,), row_format="preference")
    data = {"data_dir": tmp_path / "data"}
    stored = store_demonstrations(source, max_malformed_share=0.1, **data)
    assert sum(stored.counts.values()) == 40
    for line, reason in (
        (41, "'chosen' and 'rejected' are the same answer: nothing to prefer"),
        (42, "the assistant's turn 1 is empty"),
        (43, "'chosen' (2 turns) and 'rejected' (2) answer different prompts"),
    ):
        assert f"preferences.jsonl:{line}: {reason}" in stored.listed
    # Stored or not, a stricter share refuses them with the same lines.
    with pytest.raises(
        MalformedRowsError, match=r"(?s)3 of 43 rows.*preferences\.jsonl:41: .*:43: "
    ):
        store_demonstrations(source, max_malformed_share=0.01, **data)


def test_pairs_whose_tokens_are_equal_are_left_out_and_counted(
    rows, tmp_path, stories260k_dir, caplog
) -> None:
    """Here the answers differ beyond the limit only."""
    long = "Once upon a time there was a little dog. " * 5
    row = {"prompt": "Tell!", "chosen": long + "He ran.", "rejected": long + "He sat."}
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps(row) + "\n")
    chat = make_chat_format(load_tokenizer(stories260k_dir), template="plain")
    found = {}
    for files in ((rows,), (rows, str(same))):
        source = DemonstrationSource(files, row_format="preference", validation_fraction=0.0)
        stored = store_demonstrations(source, data_dir=tmp_path / "data").open("train")
        for cache_dir in (None, tmp_path / "data", tmp_path / "data"):
            caplog.clear()
            made = tokenize_demonstrations(stored, chat, sequence_length=96, cache_dir=cache_dir)
            assert made.report.equal_pairs == len(files) - 1
            assert (len(made), made.report.dropped) == (40, 0)
            assert ("1 of 41 dialogues are pairs whose" in caplog.text) == (len(files) == 2)
        found[len(files)] = made.fingerprint
    assert "/" not in found[1], "a run of an earlier version can resume"
    assert found[2].endswith("/distinct")


def test_stored_pairs_become_segments_side_by_side(rows, tmp_path, stories260k_dir) -> None:
    source = DemonstrationSource((rows,), row_format="preference", validation_fraction=0.3)
    stored = store_demonstrations(source, data_dir=tmp_path / "data")
    splits = {name: stored.open(name) for name in ("train", "validation")}
    prompts = {name: {one.messages[0].content for one in split} for name, split in splits.items()}
    # Both preferences of a prompt are on one side of the split.
    assert prompts["train"].isdisjoint(prompts["validation"])
    assert len(prompts["train"] | prompts["validation"]) == 20
    chat = make_chat_format(load_tokenizer(stories260k_dir), template="plain")
    made = [
        tokenize_demonstrations(
            splits["train"], chat, sequence_length=96, cache_dir=tmp_path / "data"
        )
        for _ in range(2)
    ]
    for one in made:  # tokenised, then read back
        for index, pair in enumerate(splits["train"]):
            expected = [chat.encode_dialogue(side) for side in (pair.messages, pair.rejected)]
            for found, side in zip(one.segments([index]), expected, strict=True):
                np.testing.assert_array_equal(found.tokens, side.tokens)
                np.testing.assert_array_equal(found.loss_mask, side.loss_mask)
    batches = make_train_iterator(made[0], batch_size=2, pad_id=0, packing=True, seed=0)
    seen = 0
    for _, batch in zip(range(batches.steps_per_epoch), batches, strict=False):
        for ids, counted in zip(batch.segment_ids, batch.loss_mask, strict=True):
            segments = [number for number in np.unique(ids) if number]
            assert segments == list(range(1, len(segments) + 1))
            assert len(segments) % 2 == 0
            assert all(counted[ids == number].any() for number in segments)
            seen += len(segments) // 2
    assert seen == len(made[0]) == len(splits["train"])
