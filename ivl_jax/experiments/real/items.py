"""The demonstrations of the study of a real model: GSM8K and docstrings.

In: GSM8K's two files, this machine's Python. Out: items of three splits, kinds `gsm8k` and
`docstring`; the test items are GSM8K's own and docstrings of modules that no training item names.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ivl_jax.evaluation.generation import read_json_lines
from ivl_jax.experiments.demonstrations import Item, select
from ivl_jax.experiments.family.docstrings import DocstringPair, docstring_pairs
from ivl_jax.experiments.family.facts import Split
from ivl_jax.experiments.real.settings import Budget

KINDS = ("gsm8k", "docstring")
# Held out of the training questions, to choose the step of a fine-tuning by.
VALIDATION = 20
# Characters: so that S of the embedded family, with a context of 256 tokens, can read every one.
_LONGEST_DOCSTRING = 300
_CALCULATION = re.compile(r"<<[^<>]*>>")


def gsm8k_items(folder: Path, *, train: int, held_out: int) -> list[Item]:
    """Questions of GSM8K with their worked answers, without the marks for a calculator.

    Args:
        folder: Of train.jsonl and test.jsonl.
        train: Questions of train.jsonl to train on, chosen by hash.
        held_out: Questions of test.jsonl.

    Returns:
        Items of all splits.

    Raises:
        ConfigError: A file is missing, or has a row without question or answer.
    """
    learnt = _by_hash(_rows(folder / "train.jsonl"))
    asked = _by_hash(_rows(folder / "test.jsonl"))
    splits: dict[Split, list[tuple[str, str]]] = {
        "train": learnt[VALIDATION : VALIDATION + train],
        "validation": learnt[:VALIDATION],
        "test": asked[:held_out],
    }
    return [
        Item(question, plain_answer(answer), "gsm8k", question, split)
        for split, rows in splits.items()
        for question, answer in rows
    ]


def docstring_items(
    *, train: int, held_out: int, pairs: Iterable[DocstringPair] | None = None
) -> list[Item]:
    """Questions on docstrings, split by module.

    Args:
        train: Questions to train on, chosen by hash.
        held_out: Questions to test with.
        pairs: What to choose from; None: this Python's.

    Returns:
        Items of all splits.
    """
    short = [
        Item(pair.question, pair.answer, "docstring", pair.module, pair.split)
        for pair in (docstring_pairs() if pairs is None else pairs)
        if len(pair.question) + len(pair.answer) <= _LONGEST_DOCSTRING
    ]
    short.sort(key=lambda item: _hash(item.question))
    return [
        *select(short, "train")[:train],
        *select(short, "validation")[:VALIDATION],
        *select(short, "test")[:held_out],
    ]


def real_items(gsm8k: Path, budget: Budget) -> list[Item]:
    """All items.

    Args:
        gsm8k: Folder of train.jsonl and test.jsonl.
        budget: Says how many.

    Returns:
        Items of both kinds and all splits.
    """
    return [
        *gsm8k_items(gsm8k, train=budget.gsm8k_questions, held_out=budget.held_out),
        *docstring_items(train=budget.docstring_questions, held_out=budget.held_out),
    ]


def of_kind(items: Sequence[Item], kind: str) -> list[Item]:
    """The items of one kind."""
    return [item for item in items if item.kind == kind]


def plain_answer(answer: str) -> str:
    """An answer of GSM8K without the marks that a calculator would read.

    >>> plain_answer("She has 2*3 = <<2*3=6>>6 eggs. #### 6")
    'She has 2*3 = 6 eggs. #### 6'
    """
    return _CALCULATION.sub("", answer).strip()


def _rows(path: Path) -> list[tuple[str, str]]:
    rows = read_json_lines(
        "--gsm8k (the folder of GSM8K's train.jsonl and test.jsonl)",
        path,
        problem_of=_problem,
        expected='{"question": text, "answer": text}',
    )
    return [(row["question"].strip(), row["answer"]) for _, row in rows]


def _problem(row: dict[str, Any]) -> str | None:
    missing = [name for name in ("question", "answer") if not isinstance(row.get(name), str)]
    return f"no text `{missing[0]}`; the row has {sorted(row)}" if missing else None


def _by_hash(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(rows, key=lambda row: _hash(row[0]))


def _hash(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()
