"""The demo's demonstrations as files."""

import json
from pathlib import Path

from ivl_jax.experiments.demonstrations import Item, items_hash, write_demonstrations

_ITEMS = [
    Item("Who?", "Someone does.", "fact", "someone", "train"),
    Item("What?", "Something “quoted”.", "docstring", "module", "test"),
]


def test_rows_are_messages_with_their_split_and_group(tmp_path: Path) -> None:
    files = write_demonstrations(tmp_path, _ITEMS)
    (row,) = map(json.loads, files["test"].read_text(encoding="utf-8").splitlines())
    assert row["messages"] == [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Something “quoted”."},
    ]
    assert (row["group"], row["split"]) == ("module", "test")
    assert files["validation"].read_text(encoding="utf-8") == ""


def test_the_hash_changes_with_any_answer() -> None:
    changed = [_ITEMS[0]._replace(answer="Nobody does."), _ITEMS[1]]
    assert items_hash(_ITEMS) == items_hash(list(_ITEMS))
    assert items_hash(_ITEMS) != items_hash(changed)
