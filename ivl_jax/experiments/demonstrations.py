"""The demo's demonstrations, built in seconds from this machine's Python and the invented facts.

Out: train.jsonl, validation.jsonl and test.jsonl in `messages` format. The bases have read the
facts as statements and the docstrings inside source files, but never a question: these rows teach
to answer in one sentence and to stop.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, get_args

from ivl_jax.experiments.family.docstrings import docstring_pairs
from ivl_jax.experiments.family.facts import Split, fact_questions

# Docstrings to train on, chosen by hash: an epoch on L, which is fully fine-tuned for comparison,
# takes one minute instead of three.
TRAIN_DOCSTRINGS = 1500


class Item(NamedTuple):
    """One question with its answer."""

    question: str
    answer: str
    kind: str  # "fact" or "docstring"
    group: str  # the person or the module; all items of a group are in the same split
    split: Split

    @property
    def given(self) -> tuple[str, str]:
        """The question and its answer."""
        return self.question, self.answer


def build_items() -> list[Item]:
    """Every question on the facts and on this Python's docstrings (in train: some of them)."""
    facts = [
        Item(item.question, item.answer, "fact", item.person, item.split)
        for item in fact_questions()
    ]
    docstrings = [
        Item(pair.question, pair.answer, "docstring", pair.module, pair.split)
        for pair in docstring_pairs()
    ]
    train = select(docstrings, "train")
    left_out = set(sorted(train, key=_by_hash)[TRAIN_DOCSTRINGS:])
    return facts + [item for item in docstrings if item not in left_out]


def _by_hash(item: Item) -> str:
    return hashlib.sha256(item.question.encode()).hexdigest()


def select(items: list[Item], split: Split) -> list[Item]:
    """The items of one split."""
    return [item for item in items if item.split == split]


def items_hash(items: list[Item]) -> str:
    """A hash that identifies a set of items, since docstrings depend on the Python version."""
    text = "\0".join(f"{item.question}\0{item.answer}" for item in items)
    return hashlib.sha256(text.encode()).hexdigest()


def write_demonstrations(folder: Path, items: list[Item]) -> dict[str, Path]:
    """Writes one JSONL file per split, with rows in `messages` format.

    Args:
        folder: Created if missing; files of the same names are replaced.
        items: From `build_items`.

    Returns:
        Split → file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in get_args(Split):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": item.question},
                    {"role": "assistant", "content": item.answer},
                ],
                "kind": item.kind,
                "group": item.group,
                "split": item.split,
            }
            for item in select(items, split)
        ]
        files[split] = folder / f"{split}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files[split].write_text(text, encoding="utf-8")
    return files
