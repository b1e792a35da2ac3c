"""Scores given answers under a composition, and under its base alone.

In: a composed model, questions and answers. Out: for each answer the log-probabilities of both, and
the divergence between them. Here the rows are laid out that every score of a given answer is of.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

from ivl_jax.data.chat import make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.decoding.model import ComposedModel
from ivl_jax.evaluation.scoring import Row, score_rows


class AnswerScores(NamedTuple):
    """Sums over the tokens of each answer, the end of the answer included."""

    log_prob: Float64[np.ndarray, " N"]
    """Under the composition, nats."""
    base_log_prob: Float64[np.ndarray, " N"]
    """Under the base alone, nats."""
    divergence: Float64[np.ndarray, " N"]
    """KL(composed ‖ base), exact, nats."""
    tokens: Int[np.ndarray, " N"]
    """Tokens of the answer."""

    @property
    def nll(self) -> float:
        """Nats per token, over all answers."""
        return float(-self.log_prob.sum() / self.tokens.sum())

    @property
    def kl(self) -> float:
        """KL(composed ‖ base) per token, over all answers, nats."""
        return float(self.divergence.sum() / self.tokens.sum())


def answer_rows(
    model: ComposedModel, answers: Sequence[tuple[str, str]]
) -> tuple[list[Row], list[Bool[np.ndarray, " _"]]]:
    """Questions with their answers, as `score_rows` takes them.

    Args:
        model: The composition; the base's tokenizer makes the tokens.
        answers: Question and answer.

    Returns:
        The rows, and which of each row's tokens after the first are the answer's, its end included.
    """
    asked = [(Message("user", question),) for question, _ in answers]
    chat_format = make_chat_format(model.tokenizer)
    rows, masks = [], []
    for messages, prompt, (_, answer) in zip(asked, model.prepare(asked), answers, strict=True):
        whole = chat_format.encode_dialogue((*messages, Message("assistant", answer)))
        start = len(prompt.token_ids)
        rows.append(Row([*prompt.token_ids, *whole.tokens[start:].tolist()], prompt=prompt))
        masks.append(np.arange(1, len(rows[-1].token_ids)) >= start)
    return rows, masks


class ItemScores(NamedTuple):
    """Sums over the tokens of each answer, the end of the answer included."""

    nats: Float64[np.ndarray, " N"]
    """−log p of the answer."""
    tokens: Int[np.ndarray, " N"]
    likeliest: Bool[np.ndarray, " N"]
    """Whether each token has the largest logit after those before it, ties included."""

    @property
    def nll(self) -> float:
        """Nats per token, over all answers."""
        return float(self.nats.sum() / self.tokens.sum())


def score_given(
    model: ComposedModel,
    rows: Sequence[Row],
    masks: Sequence[Bool[np.ndarray, " _"]],
    *,
    batch_size: int = 64,
    temperature: float = 1.0,
    advance: Callable[[], object] = lambda: None,
) -> ItemScores:
    """Score answers that have been laid out.

    Args:
        model: The composition.
        rows: From `answer_rows`, like the next.
        masks: Which tokens are the answers'.
        batch_size: Answers scored together.
        temperature: What composed logits are divided by.
        advance: Called after each answer.

    Returns:
        The scores, in order.
    """
    nats, likeliest = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for index, scores in score_rows(model, rows, batch_size=batch_size, temperature=temperature):
        mask = masks[index]
        nats[index] = -scores.tokens.log_prob[mask].sum(dtype=np.float64)
        likeliest[index] = scores.tokens.largest[mask].all()
        advance()
    return ItemScores(nats, np.asarray([int(mask.sum()) for mask in masks]), likeliest)


def score_answers(
    model: ComposedModel, answers: Sequence[tuple[str, str]], *, batch_size: int = 64
) -> AnswerScores:
    """Score answers to questions.

    Args:
        model: The composition; the base's tokenizer counts the tokens.
        answers: Question and answer.
        batch_size: Answers scored together.

    Returns:
        The scores, in order.
    """
    rows, masks = answer_rows(model, answers)
    sums = np.zeros((3, len(rows)), np.float64)
    for index, scores in score_rows(model, rows, batch_size=batch_size, with_base=True):
        assert scores.base is not None, "requested above"
        each = scores.tokens.log_prob, scores.base.log_prob, scores.base.divergence
        sums[:, index] = [part[masks[index]].sum(dtype=np.float64) for part in each]
    log_prob, base_log_prob, divergence = sums
    lengths = np.asarray([int(mask.sum()) for mask in masks])
    return AnswerScores(log_prob, base_log_prob, divergence, lengths)
