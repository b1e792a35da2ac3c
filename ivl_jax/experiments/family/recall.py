"""What a model knows of the invented facts when it is asked in the form in which it has read them.

In: a language model, facts. Out: the share of statements that it completes. It bounds what a value
network, which knows no facts of its own, can bring out of the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.experiments.family.facts import Fact


def recall(model: ComposedModel, facts: Sequence[Fact], *, rows: int = 64) -> float:
    """The share of facts whose statement a model completes greedily with the right value.

    Args:
        model: The model, usually a base alone.
        facts: What is asked; each in the form of its answer, `{person} lives in`.
        rows: Statements scored together.

    Returns:
        The share, in [0, 1].
    """
    tokenizer: Any = model.tokenizer
    encoded, values = [], []
    for fact in facts:
        statement = fact.statement()
        found = tokenizer.backend_tokenizer.encode(statement, add_special_tokens=False)
        start = statement.rindex(fact.value)
        end = start + len(fact.value)
        # Documents begin after the end-of-text token in pre-training.
        encoded.append(Row([tokenizer.eos_token_id, *found.ids]))
        values.append(np.asarray([start < last <= end for _, last in found.offsets]))
    right = np.zeros(len(facts), bool)
    for index, scores in score_rows(model, encoded, batch_size=rows):
        right[index] = scores.tokens.largest[values[index]].all()
    return float(right.mean())
