"""What is cut, dropped or malformed is counted and said; tokens are computed once."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.demonstrations import (
    Demonstration,
    DemonstrationSource,
    MalformedRowsError,
    Message,
    store_demonstrations,
)
from ivl_jax.data.tokenized import tokenize_demonstrations

REFUSES = (
    "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('bad words') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] + '<eos>' }}{% endfor %}"
)


def _demonstrations(*answers: str, question: str = "Why?") -> list[Demonstration]:
    return [
        Demonstration((Message("user", question), Message("assistant", answer)), f"a.jsonl:{i}")
        for i, answer in enumerate(answers, start=1)
    ]


def _tokenize(demonstrations: Any, tokenizer: Any, **options: Any) -> Any:
    defaults = {"template": "plain", "sequence_length": 256, "cache_dir": None}
    options = {**defaults, **options}
    chat = make_chat_format(tokenizer, template=options.pop("template"))
    return tokenize_demonstrations(demonstrations, chat, **options)


def test_tokens_and_masks_are_those_of_each_dialogue(
    byte_tokenizer: Any, arithmetic: list[Demonstration]
) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")
    tokenized = _tokenize(arithmetic, byte_tokenizer)
    assert len(tokenized) == 30
    for index, demonstration in enumerate(arithmetic):
        expected = chat.encode_dialogue(demonstration.messages)
        assert tokenized[index].tokens.tolist() == expected.tokens.tolist()
        assert tokenized[index].loss_mask.tolist() == expected.loss_mask.tolist()
        assert tokenized.row_id(index) == demonstration.row_id
        assert tokenized.lengths[index] == len(expected.tokens)
    report = tokenized.report
    assert (report.dialogues, report.kept, report.cut, report.dropped) == (30, 30, 0, 0)
    assert report.tokens == len(tokenized.tokens)
    assert report.targets == tokenized.loss_mask.sum()
    with pytest.raises(IndexError):
        tokenized[30]


def test_a_cut_dialogue_keeps_its_beginning_and_is_counted(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # "Question: Why?\nAnswer:" is 22 tokens, " " and the answer follow, then the end of turn.
    demonstrations = _demonstrations("abc", "abcd", "abcde")
    tokenized = _tokenize(demonstrations, byte_tokenizer, sequence_length=26)
    assert tokenized.lengths.tolist() == [27, 27, 27]
    assert tokenized[1].tokens[-1] != byte_tokenizer.eos_token_id
    assert tokenized[0].tokens[-1] == byte_tokenizer.eos_token_id
    assert tokenized.report.cut == 2
    assert tokenized.report.targets == 15
    assert "2 of 3 dialogues are longer than 26 tokens and were truncated" in caplog.text


def test_a_dialogue_without_a_target_left_is_dropped_and_counted(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    long = _demonstrations("Because.", question="Why? " * 20)
    demonstrations = _demonstrations("a") + long + _demonstrations("b")
    tokenized = _tokenize(demonstrations, byte_tokenizer, sequence_length=40)
    assert tokenized.report.dropped == 1
    assert tokenized.rows.tolist() == [0, 2]
    assert tokenized.row_id(1) == "a.jsonl:1"
    assert "1 of 3 dialogues have no assistant's token within the limit" in caplog.text
    with pytest.raises(
        MalformedRowsError,
        match=r"and 0 have an assistant's token within the 40 tokens that are read\nuse another",
    ):
        _tokenize(long, byte_tokenizer, sequence_length=40)


def test_rows_keep_their_names_beyond_a_chunk(byte_tokenizer: Any) -> None:
    demonstrations = _demonstrations(*map(str, range(1200)))
    demonstrations[3] = _demonstrations("Because.", question="Why? " * 20)[0]
    tokenized = _tokenize(demonstrations, byte_tokenizer, sequence_length=40)
    assert len(tokenized) == 1199
    for index in (0, 2, 510, 511, 512, 1198):
        answer = byte_tokenizer.decode(tokenized[index].tokens[tokenized[index].loss_mask])
        assert tokenized.row_id(index) == f"a.jsonl:{int(answer.removesuffix('<eos>')) + 1}"


def test_the_last_token_that_fits_is_enough_to_learn_from(byte_tokenizer: Any) -> None:
    tokenized = _tokenize(_demonstrations("a"), byte_tokenizer, sequence_length=22)
    assert tokenized[0].loss_mask.tolist() == [False] * 22 + [True]
    with pytest.raises(MalformedRowsError):
        _tokenize(_demonstrations("a"), byte_tokenizer, sequence_length=21)


def test_dialogues_that_cannot_be_rendered_are_named_and_stop_a_run_when_many(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    demonstrations = _demonstrations(*"abc") + _demonstrations("d", question="A bad one?")
    with pytest.raises(MalformedRowsError, match="1 of 4 dialogues cannot be rendered") as caught:
        _tokenize(demonstrations, byte_tokenizer, template=REFUSES)
    assert "a.jsonl:1: chat template given as Jinja text: bad words" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        tokenized = _tokenize(
            demonstrations, byte_tokenizer, template=REFUSES, max_malformed_share=0.25
        )
    assert len(tokenized) == 3
    assert "1 of 4 dialogues cannot be rendered and were left out" in caplog.text


def test_special_texts_in_messages_are_counted(
    byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenized = _tokenize(_demonstrations("a <eos> b", "c"), byte_tokenizer)
    assert tokenized.report.special_texts == 1
    assert "1 of 2 dialogues contain a special token's text in a message" in caplog.text


def test_tokens_are_computed_once(
    byte_tokenizer: Any,
    arithmetic: list[Demonstration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")
    options: dict[str, Any] = {"sequence_length": 40, "cache_dir": tmp_path}
    first = tokenize_demonstrations(arithmetic, chat, **options)
    in_memory = tokenize_demonstrations(arithmetic, chat, sequence_length=40, cache_dir=None)
    assert first.report.cut > 0

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(chat, "encode_dialogues", fail)
    second = tokenize_demonstrations(arithmetic, chat, **options)
    for name in ("tokens", "loss_mask", "starts", "rows"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        np.testing.assert_array_equal(getattr(first, name), getattr(in_memory, name))
    assert first.report == second.report == in_memory.report
    assert first.fingerprint == second.fingerprint == in_memory.fingerprint
    for changed in ({"sequence_length": 41}, {"cache_dir": None}):
        with pytest.raises(AssertionError, match="encoded again"):
            tokenize_demonstrations(arithmetic, chat, **{**options, **changed})
    with pytest.raises(AssertionError, match="encoded again"):
        tokenize_demonstrations(arithmetic[:-1], chat, **options)


def test_the_fingerprint_follows_everything_that_makes_tokens(
    byte_tokenizer: Any, arithmetic: list[Demonstration], shared_tokenizer: Any
) -> None:
    fingerprints = {
        _tokenize(demonstrations, tokenizer, **options).fingerprint
        for demonstrations, tokenizer, options in (
            (arithmetic, byte_tokenizer, {}),
            (arithmetic[:-1], byte_tokenizer, {}),
            (arithmetic, byte_tokenizer, {"template": "vicuna"}),
            (arithmetic, byte_tokenizer, {"sequence_length": 255}),
            (arithmetic, shared_tokenizer("stories260k"), {}),
        )
    }
    assert len(fingerprints) == 5


def test_an_interrupted_tokenisation_is_done_again(
    byte_tokenizer: Any,
    arithmetic: list[Demonstration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "encode_dialogues", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize_demonstrations(arithmetic, chat, sequence_length=64, cache_dir=tmp_path)
    monkeypatch.undo()
    tokenized = tokenize_demonstrations(arithmetic, chat, sequence_length=64, cache_dir=tmp_path)
    assert len(tokenized) == 30


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "starts", "rows", "manifest"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_tokens_are_reported_and_made_again(
    byte_tokenizer: Any,
    arithmetic: list[Demonstration],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")
    options: dict[str, Any] = {"sequence_length": 100, "cache_dir": tmp_path}
    first = tokenize_demonstrations(arithmetic, chat, **options)
    (file,) = tmp_path.glob(f"tokenized/*/{name}.*")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    caplog.clear()
    again = tokenize_demonstrations(arithmetic, chat, **options)
    assert "the cached tokens in" in caplog.text
    assert "were changed after they were written and are made again" in caplog.text
    assert file.name in caplog.text
    in_memory = tokenize_demonstrations(arithmetic, chat, sequence_length=100, cache_dir=None)
    for array in ("tokens", "loss_mask", "starts", "rows"):
        np.testing.assert_array_equal(getattr(again, array), getattr(in_memory, array))
    assert again.report == first.report
    caplog.clear()
    caplog.set_level(logging.WARNING)  # how many were tokenised is no news
    tokenize_demonstrations(arithmetic, chat, **options)
    assert caplog.text == ""


def test_tokens_are_on_the_disk_before_they_count(
    byte_tokenizer: Any,
    arithmetic: list[Demonstration],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = make_chat_format(byte_tokenizer, template="plain")
    flushed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(file: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def noted_rename(*names: str) -> None:
        flushed.append("rename")
        rename(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    tokenize_demonstrations(arithmetic, chat, sequence_length=100, cache_dir=tmp_path)
    before = flushed[: flushed.index("rename")]
    names = {Path(name).name.partition(".tmp")[0] for name in before}
    assert names >= {"tokens.bin", "loss_mask.bin", "starts.bin", "rows.bin", "manifest.json"}
    assert flushed[-1] == str(tmp_path / "tokenized"), "the new name is on the disk too"


def test_a_stored_split_is_read_through_its_data_source(
    byte_tokenizer: Any, gsm8k_dir: Path, tmp_path: Path
) -> None:
    source = DemonstrationSource(
        (str(gsm8k_dir / "test.jsonl"),),
        row_format="fields",
        templates={"user": "{question}", "assistant": "{answer}"},
    )
    split = store_demonstrations(source, data_dir=tmp_path).open("validation")
    tokenized = _tokenize(split, byte_tokenizer, sequence_length=2048, cache_dir=tmp_path)
    assert len(tokenized) == len(split)
    position = len(split) // 2
    assert tokenized.row_id(position) == split[position].row_id
    ids = tokenized[position].tokens[tokenized[position].loss_mask]
    answer = split[position].messages[1].content
    assert byte_tokenizer.decode(ids) == f" {answer.strip()}<eos>"
