"""What the post-training demos start from: shares, pairs, and a stop in the middle."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ivl_jax.config import ConfigError
from ivl_jax.experiments import demo_post_training
from ivl_jax.experiments.answer_pairs import pair_rows
from ivl_jax.experiments.demonstrations import Item, some_of, write_questions
from ivl_jax.experiments.family.facts import Split
from ivl_jax.experiments.kept_results import InterruptedTrainingError

SPLITS: list[Split] = [*(["train"] * 400), *(["test"] * 20)]
ITEMS = [
    Item(f"Question {i}?", f"Answer {i}.", "fact", f"person {i // 4}", split)
    for i, split in enumerate(SPLITS)
]


def test_a_share_of_the_training_items_is_kept_and_every_other_item() -> None:
    kept = some_of(ITEMS, 0.1)
    assert 20 < sum(item.split == "train" for item in kept) < 60
    assert [item for item in kept if item.split == "test"] == ITEMS[400:]
    assert some_of(ITEMS, 0.1) == kept
    assert set(some_of(ITEMS, 0.05)) <= set(kept)
    other = [item for item in some_of(ITEMS, 0.1, seed=1) if item.split == "train"]
    assert 20 < len(other) < 60
    assert len(set(other) & set(kept)) < 20


def test_only_questions_answered_wrongly_become_pairs() -> None:
    answers = [["Answer 0."], ["Answer 1. ", "", "No."], ["Answer 3."]]
    rows = pair_rows(ITEMS[:3], answers)
    assert [(row["prompt"], row["rejected"]) for row in rows] == [
        ("Question 1?", "No."),
        ("Question 2?", "Answer 3."),
    ]
    assert all(row["chosen"] != row["rejected"] for row in rows)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a folder of its own; the items are the ones above, and nothing is trained."""
    monkeypatch.setattr(demo_post_training, "build_items", lambda: ITEMS)
    stopped = SimpleNamespace(output=None)
    monkeypatch.setattr(demo_post_training, "run", lambda _: stopped)
    return ["--run-dir", str(tmp_path / "made")]


def test_a_stopped_training_ends_the_command_before_anything_is_made_of_it(arguments) -> None:
    for _ in range(2):
        with pytest.raises(InterruptedTrainingError, match="run the command again"):
            demo_post_training._run(arguments)
    made = {path.name for path in Path(arguments[1]).iterdir()}
    assert made == {"options.json", "demonstrations"}


def test_a_folder_made_with_other_options_is_refused_and_named(arguments) -> None:
    with pytest.raises(InterruptedTrainingError):
        demo_post_training._run(arguments)
    with pytest.raises(ConfigError, match=r"made was made with other options \(share, samples"):
        demo_post_training._run([*arguments, "--share", "0.2", "--samples", "9"])


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "questions.jsonl"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_questions(file, ITEMS[:2])
    assert list(tmp_path.iterdir()) == []
    write_questions(file, ITEMS[:2])
    assert file.read_text(encoding="utf-8").count("\n") == 2
