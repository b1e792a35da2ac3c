"""What the post-training demos start from: shares and pairs."""

from ivl_jax.experiments.demonstrations import Item
from ivl_jax.experiments.demo_post_training import pair_rows, some_of

ITEMS = [
    Item(f"Question {i}?", f"Answer {i}.", "fact", f"person {i // 4}", split)
    for i, split in enumerate(["train"] * 400 + ["test"] * 20)
]


def test_a_share_of_the_training_items_is_kept_and_every_other_item() -> None:
    kept = some_of(ITEMS, 0.1)
    assert 20 < sum(item.split == "train" for item in kept) < 60
    assert [item for item in kept if item.split == "test"] == ITEMS[400:]
    assert some_of(ITEMS, 0.1) == kept
    assert set(some_of(ITEMS, 0.05)) <= set(kept)


def test_only_questions_answered_wrongly_become_pairs() -> None:
    answers = [["Answer 0."], ["Answer 1. ", "", "No."], ["Answer 3."]]
    rows = pair_rows(ITEMS[:3], answers)
    assert [(row["prompt"], row["rejected"]) for row in rows] == [
        ("Question 1?", "No."),
        ("Question 2?", "Answer 3."),
    ]
    assert all(row["chosen"] != row["rejected"] for row in rows)
