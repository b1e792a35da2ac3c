"""The demonstrations of the study of a real model."""

import json

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.experiments.demonstrations import select
from ivl_jax.experiments.family.docstrings import DocstringPair
from ivl_jax.experiments.real.items import VALIDATION, docstring_items, gsm8k_items, of_kind


def write_gsm8k(folder, *, train=60, test=12, reverse=False):
    """Small files like GSM8K's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in (("train", train), ("test", test)):
        rows = [
            {
                "question": f"{name} {i} + 1?",
                "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1} #### {i + 1}",
            }
            for i in range(number)
        ]
        text = "".join(json.dumps(row) + "\n" for row in (rows[::-1] if reverse else rows))
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_gsm8k_is_split_by_its_own_files_whatever_their_order(tmp_path):
    items = gsm8k_items(write_gsm8k(tmp_path / "a"), train=30, held_out=10)
    sizes = {split: len(select(items, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 30, "validation": VALIDATION, "test": 10}
    assert len({item.question for item in items}) == len(items)
    assert all(item.question.startswith("test") == (item.split == "test") for item in items)
    again = gsm8k_items(write_gsm8k(tmp_path / "b", reverse=True), train=30, held_out=10)
    assert again == items
    fewer = gsm8k_items(tmp_path / "a", train=5, held_out=10)
    assert select(fewer, "train") == select(items, "train")[:5]
    assert select(fewer, "validation") == select(items, "validation")


def test_an_answer_keeps_its_steps_but_no_marks_for_a_calculator(tmp_path):
    (item, *_) = gsm8k_items(write_gsm8k(tmp_path), train=1, held_out=1)
    number = int(item.question.split()[1])
    assert item.answer == f"{number} + 1 = {number + 1} #### {number + 1}"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "--gsm8k .*no file at .*train.jsonl"),
        ('{"question": "1?"}\n', "train.jsonl:1: no text `answer`"),
        ("[1]\n", "train.jsonl:1: not an object"),
    ],
)
def test_files_that_are_not_gsm8k_are_refused(tmp_path, rows, message):
    if rows is not None:
        (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match=message):
        gsm8k_items(tmp_path, train=1, held_out=1)


def test_docstrings_are_split_by_module_and_short():
    pairs = [
        DocstringPair(f"What does `m{i}.f` do?", "It is short.", f"m{i}", split)
        for i, split in enumerate(("train", "train", "train", "validation", "test", "test"))
    ]
    pairs.append(DocstringPair("What does `long.f` do?", "Long. " * 60, "long", "train"))
    items = docstring_items(train=2, held_out=1, pairs=pairs)
    found = {split: [one.group for one in select(items, split)] for split in ("train", "test")}
    assert len(found["train"]) == 2
    assert set(found["train"]) <= {"m0", "m1", "m2"}
    assert len(found["test"]) == 1
    assert found["test"][0] in ("m4", "m5")
    assert of_kind(items, "docstring") == items
    assert of_kind(items, "gsm8k") == []
