"""Finds the prompts that leave room for an answer, before answers to them are sampled.

In: tokenised dialogues and their chat format. Out: which of them have a prompt short enough. The
prompt is everything before the last answer.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ivl_jax.data.chat import ChatFormat, ChatTemplateError
from ivl_jax.data.tokenized import TokenizedDemonstrations


class Prompts(NamedTuple):
    """The prompts of a split, by whether an answer fits behind them."""

    kept: Int64[np.ndarray, "K"]  # indices of the dialogues, in order
    left_out: tuple[tuple[str, str], ...]  # file and line of each of the others, and why


def prompts_with_room(
    tokenized: TokenizedDemonstrations, chat: ChatFormat, *, longest: int
) -> Prompts:
    """Finds the dialogues whose prompt has at most `longest` tokens.

    Args:
        tokenized: The dialogues.
        chat: The chat format that they were tokenised with.
        longest: Tokens of the longest prompt that leaves room for an answer.

    Returns:
        Their indices, and the others by file and line.
    """
    # A prompt is a prefix of its dialogue: only those of long dialogues need to be measured.
    unclear = np.flatnonzero(tokenized.lengths > longest)
    fits = np.ones(len(tokenized), bool)
    left_out = []
    for index in unclear.tolist():
        demonstration = tokenized.demonstrations[int(tokenized.rows[index])]
        try:
            length = len(chat.encode_prompt(demonstration.messages[:-1]))
        except ChatTemplateError as error:
            reason = str(error)
        else:
            if length <= longest:
                continue
            reason = f"its prompt has {length} tokens"
        fits[index] = False
        left_out.append((demonstration.row_id, reason))
    return Prompts(np.flatnonzero(fits), tuple(left_out))
