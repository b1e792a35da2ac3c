"""The demo's demonstrations, built in seconds from this machine's Python and the invented facts.

Out: train.jsonl, validation.jsonl and test.jsonl in `messages` format. The bases have read the
facts as statements and the docstrings inside source files, but never a question: these rows teach
to answer in one sentence and to stop.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ivl_jax.experiments.family.docstrings import docstring_pairs
from ivl_jax.experiments.family.facts import Split, fact_questions, new_facts
from ivl_jax.paths import write_atomically

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


def new_items() -> list[Item]:
    """One question per new fact, in one of the two forms; none are for training."""
    return [
        Item(question.question, question.answer, "fact", question.person, "test")
        for question in {item.answer: item for item in fact_questions(new_facts())}.values()
    ]


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
            dialogue_row(item, kind=item.kind, group=item.group, split=item.split)
            for item in select(items, split)
        ]
        files[split] = folder / f"{split}.jsonl"
        write_rows(files[split], rows)
    return files


def write_questions(path: Path, items: Sequence[Item]) -> None:
    """Write questions with their right answers, as `format = "messages"` reads them."""
    write_rows(path, (dialogue_row(item, group=item.group) for item in items))


def dialogue_row(item: Item, **columns: str) -> dict[str, Any]:
    """A row of `format = "messages"`: the question, its answer, and further columns."""
    messages = (("user", item.question), ("assistant", item.answer))
    return {"messages": [{"role": role, "content": text} for role, text in messages], **columns}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines; a stop in the middle leaves the file as it was."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode())


def some_of(items: Sequence[Item], share: float, *, seed: int = 0) -> list[Item]:
    """A share of the training items, chosen by hash, and all others.

    Args:
        items: of all splits.
        share: of the training items to keep, in (0, 1].
        seed: another seed keeps others.

    Returns:
        The items in order.
    """
    return [item for item in items if item.split != "train" or _draw(item, seed) < share]


def target_rows(items: Sequence[Item], count: int) -> list[Item]:
    """Validation items that a target's settings are chosen on, both kinds in equal parts."""
    return [
        item
        for kind in ("fact", "docstring")
        for item in sorted(
            (item for item in items if item.split == "validation" and item.kind == kind),
            key=_by_hash,
        )[: count // 2]
    ]


def _draw(item: Item, seed: int) -> float:
    drawn = f"share {seed}" if seed else "share"
    digest = hashlib.sha256(f"{item.question}\0{drawn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
