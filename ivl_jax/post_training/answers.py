"""Sampled answers, and the batches that they make.

In: prompts and their generations. Out: a `Batch` with one answer per row, figures, records.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ivl_jax.data.batching import Batch, lay_out_rows
from ivl_jax.data.formats import Demonstration
from ivl_jax.decoding.generation import Generation
from ivl_jax.rewards import Sample


class Answers(NamedTuple):
    """Answers to prompts."""

    prompts: Sequence[Sequence[int]]
    """The tokens of each prompt."""
    generations: Sequence[Generation]
    samples: Sequence[Sample]
    """The texts, as rewards read them."""

    @property
    def truncated(self) -> np.ndarray:
        """Which answers reached the most tokens that an answer may have."""
        return np.asarray([one.finish_reason == "length" for one in self.generations])

    @property
    def tokens(self) -> int:
        """Tokens of all answers together."""
        return sum(len(one.token_ids) for one in self.generations)

    def figures(self) -> dict[str, float]:
        """Means over the answers."""
        return {
            "answer_tokens": self.tokens / len(self.generations),
            "truncated": float(self.truncated.mean()),
        }


def sample_of(demonstration: Demonstration, answer: str) -> Sample:
    """An answer to a demonstration's prompt, as rewards read it.

    Args:
        demonstration: whose last message is the reference.
        answer: the text of the answer.

    Returns:
        The sample.
    """
    prompt, reference = demonstration.messages[-2:]
    return Sample(answer, reference.content, prompt.content, demonstration.row_id)


def lay_out_answers(
    answers: Answers, *, rows: int, length: int, pad_id: int, mask_truncated: bool
) -> Batch:
    """Put one answer in each row, after its prompt.

    Args:
        answers: at most as many as rows; empty rows follow.
        rows: of the batch, B.
        length: positions per row, T.
        pad_id: token id of the padding.
        mask_truncated: leave truncated answers out of the loss.

    Returns:
        NumPy arrays [B T]; the loss mask marks the answers.
    """
    left_out = answers.truncated if mask_truncated else np.zeros(len(answers.prompts), bool)
    laid_out: list[Any] = []
    for prompt, one, leave_out in zip(answers.prompts, answers.generations, left_out, strict=True):
        ids = np.asarray([*prompt, *one.token_ids], np.int32)
        laid_out.append([(ids, (np.arange(len(ids)) >= len(prompt)) & ~leave_out)])
    laid_out += [[] for _ in range(rows - len(laid_out))]
    return lay_out_rows(laid_out, sequence_length=length, pad_id=pad_id)
