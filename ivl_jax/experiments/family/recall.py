"""What a model knows of the invented facts when it is asked in the form in which it has read them.

In: a language model, facts. Out: which statements it completes. Their share bounds what a value
network can bring out of the model, but not what the two answer together: a value network that was
pre-trained as S knows facts of its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerFast

from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.experiments.family.facts import Fact


def recalled(
    model: ComposedModel, facts: Sequence[Fact], *, rows: int = 64
) -> Bool[np.ndarray, " N"]:
    """Which facts' statements a model completes greedily with the right value.

    Args:
        model: The model, usually a base alone.
        facts: What is asked; each in the form of its answer, `{person} lives in`.
        rows: Statements scored together.

    Returns:
        One entry per fact.
    """
    tokenizer: Any = model.tokenizer
    statements = [statement_row(tokenizer, fact) for fact in facts]
    right = np.zeros(len(facts), bool)
    for index, scores in score_rows(
        model, [Row(each.token_ids) for each in statements], batch_size=rows
    ):
        right[index] = scores.tokens.largest[statements[index].is_value].all()
    return right


class StatementRow(NamedTuple):
    """A statement of n tokens, as pre-training reads it."""

    token_ids: list[int]  # n + 1: documents begin after the end-of-text token
    is_value: Bool[np.ndarray, " n"]  # the targets that spell the fact's value


def statement_row(tokenizer: PreTrainedTokenizerFast, fact: Fact) -> StatementRow:
    """The statement whose value a model has to complete.

    Args:
        tokenizer: The model's.
        fact: What is asked.
    """
    end_of_text: Any = tokenizer.eos_token_id  # its declared type is a broad union
    statement = fact.statement()
    encoded = tokenizer.backend_tokenizer.encode(statement, add_special_tokens=False)
    start = statement.rindex(fact.value)
    end = start + len(fact.value)
    is_value = np.asarray([start < last <= end for _, last in encoded.offsets])
    return StatementRow([end_of_text, *encoded.ids], is_value)
