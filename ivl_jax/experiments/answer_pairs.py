"""Preferences from a value network's own mistakes: the right answer beside a sampled wrong one.

In: questions, a value folder. Out: rows in `preference` format.
"""

from collections.abc import Sequence
from pathlib import Path

from ivl_jax.assets import family_folder
from ivl_jax.config import GenerationOptions
from ivl_jax.data.formats import Message
from ivl_jax.decoding.compose import compose
from ivl_jax.experiments.demonstrations import Item, write_rows
from ivl_jax.experiments.measure import FACT_TOKENS


def pair_rows(items: Sequence[Item], answers: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Preferences of the right answer over a sampled one.

    Args:
        items: Questions.
        answers: Of each question, its sampled answers.

    Returns:
        A row for each question that was answered wrongly at least once: the first wrong answer.

    Example:
        >>> item = Item("Where?", "Here.", "fact", "someone", "test")
        >>> pair_rows([item, item], [["Here.", " There.", "Nowhere."], ["Here."]])
        [{'prompt': 'Where?', 'chosen': 'Here.', 'rejected': 'There.'}]
    """
    rows = []
    for item, given in zip(items, answers, strict=True):
        stripped = (answer.strip() for answer in given)
        wrong = next((one for one in stripped if one and one != item.answer), None)
        if wrong is not None:
            rows.append({"prompt": item.question, "chosen": item.answer, "rejected": wrong})
    return rows


def write_pairs(
    path: Path, items: Sequence[Item], value: Path, *, samples: int, seed: int = 0
) -> None:
    """Write the right answers beside wrong ones that S with a value network gives.

    Args:
        path: JSONL file.
        items: Questions.
        value: Value folder.
        samples: Answers sampled per question, from which the rejected one is chosen.
        seed: Of sampling.
    """
    model = compose(str(family_folder("S")), str(value))
    options = GenerationOptions(max_new_tokens=FACT_TOKENS, temperature=1.0, seed=seed)
    asked = [(Message("user", item.question),) for item in items for _ in range(samples)]
    generations = model.generate_prepared(model.prepare(asked, options), batch_size=64)
    texts = [one.text for one in generations]
    answers = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    write_rows(path, pair_rows(items, answers))
