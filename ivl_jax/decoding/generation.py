"""What comes out of decoding: one continuation, and what was likely at each of its tokens.

In: nothing; these are records.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenLogProbs:
    """How likely one generated token was.

    In nats, under the softmax of the composed logits: before logit bias, temperature, top-k, top-p
    and min-p.

    Attributes:
        log_prob: Log-probability of the token itself.
        top: (token id, log-probability) of the likeliest tokens at its place, the likeliest first;
            as many as were asked for.
        base_log_prob: Log-probability of the token under the base alone.
    """

    log_prob: float
    top: tuple[tuple[int, float], ...] = ()
    base_log_prob: float = 0.0


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        text: What was generated, cut before a stop string; special tokens stand for nothing.
        token_ids: Generated ids. The last one is the stop id that ended the row, or the token that
            completed the stop string.
        finish_reason: `eos` (a stop id), `stop_string`, `length` (the limit asked for, or the end
            of the context), or `error` (no next token could be chosen; see `error`).
        prompt_tokens: Tokens of the prompt.
        error: What went wrong, and in which network; None where nothing did.
        log_probs: Of each generated token, where they were asked for; else None. Not compared:
            batches of other sizes round them otherwise.
        proposed_tokens: Tokens that were proposed and verified: those accepted, and each first one
            that was not; 0 without a draft. Not compared.
        accepted_tokens: Those that were accepted. Not compared.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    error: str | None = None
    log_probs: tuple[TokenLogProbs, ...] | None = field(default=None, compare=False, repr=False)
    proposed_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)

    def text_of(self, name: str) -> str:
        """Return the text, or raise: an error must not pass for an empty or a short text.

        Args:
            name: what messages call the prompt.

        Raises:
            GenerationError: it ended with an error.
        """
        if self.error is not None:
            raise GenerationError(f"{name}: {self.error}")
        return self.text

    def to_record(self) -> dict[str, Any]:
        """Its fields in a line of an output file; `error` only if it ended with one."""
        record = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": len(self.token_ids),
        }
        return record if self.error is None else record | {"error": self.error}


class GenerationError(RuntimeError):
    """Generations that ended with an error where a text was needed."""
