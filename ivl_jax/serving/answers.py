"""Answers: what the choices of a request have got, as OpenAI's objects.

In: progress of each choice. Out: JSON objects: whole answers, or chunks of a stream.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ivl_jax.decoding.generation import Generation, TokenLogProbs
from ivl_jax.serving.engine_thread import ChoiceProgress
from ivl_jax.version import __version__

Kind = Literal["chat", "text"]
_REASONS = {"eos": "stop", "stop_string": "stop", "length": "length"}
# Another version may sample other tokens for the same seed.
_FINGERPRINT = f"ivl_jax-{__version__}"
_OBJECTS = {"chat": "chat.completion", "text": "text_completion"}


@dataclass
class TokenTexts:
    """What tokens are called in log-probabilities.

    Attributes:
        token_bytes: Bytes of each id; empty for special tokens.
        special: Text of each special token.
    """

    token_bytes: Sequence[bytes]
    special: dict[int, str]

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes; of a special token those of its name."""
        if token_id in self.special:
            return self.special[token_id].encode()
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    def text_of(self, token_id: int) -> str:
        """A token's text; bytes that are not a whole character are U+FFFD."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")


@dataclass
class Answer:
    """One answer, or one stream of chunks.

    Attributes:
        kind: Which endpoint it is of.
        model: The model's name, as the request gave it.
        choices: How many there are.
        prompt_tokens: Tokens of all prompts.
        texts: What tokens are called.
        log_probs: Whether they are asked for.
        shows_usage: Whether a stream ends with the numbers of tokens.
        strengths: What each value network had, by name.
    """

    kind: Kind
    model: str
    choices: int
    prompt_tokens: int
    texts: TokenTexts
    log_probs: bool
    shows_usage: bool
    strengths: dict[str, float]
    id: str = ""
    created: int = 0
    _generations: dict[int, Generation] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Give it an id and a time."""
        self.id = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def take(self, event: ChoiceProgress) -> None:
        """Take what a choice has got."""
        if event.progress.generation is not None:
            self._generations[event.choice] = event.progress.generation

    def whole(self) -> dict[str, Any]:
        """The answer, once every choice has ended."""
        choices = []
        for index in range(self.choices):
            generation = self._generations[index]
            log_probs = None
            if self.log_probs:
                shown = _shown(generation.token_ids, generation)
                log_probs = self._log_probs(index, shown, generation.log_probs or ())
            choice = {
                "index": index,
                "logprobs": log_probs,
                "finish_reason": _REASONS[generation.finish_reason],
            }
            if self.kind == "chat":
                choice["message"] = {
                    "role": "assistant",
                    "content": generation.text,
                    "refusal": None,
                }
            else:
                choice["text"] = generation.text
            choices.append(choice)
        return {**self._head(_OBJECTS[self.kind]), "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, whose turn it is."""
        if self.kind == "text":
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, delta=delta) for index in range(self.choices)]

    def chunk(self, event: ChoiceProgress) -> dict[str, Any] | None:
        """What a stream says of some progress; None: nothing yet."""
        index, progress = event
        self.take(event)
        generation = progress.generation
        reason = None if generation is None else _REASONS[generation.finish_reason]
        if not progress.piece and reason is None and not self.log_probs:
            return None
        log_probs = None
        if self.log_probs:
            shown = _shown(progress.token_ids, generation)
            log_probs = self._log_probs(index, shown, progress.log_probs)
        if self.kind == "text":
            return self._chunk(index, text=progress.piece, reason=reason, log_probs=log_probs)
        delta = {"content": progress.piece} if progress.piece or reason is None else {}
        return self._chunk(index, delta=delta, reason=reason, log_probs=log_probs)

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, of a request that asks for it."""
        return {**self._head(self._chunk_object), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """How many tokens were read and generated; those that a draft proposed among them."""
        each = self._generations.values()
        generated = sum(len(generation.token_ids) for generation in each)
        accepted = sum(generation.accepted_tokens for generation in each)
        proposed = sum(generation.proposed_tokens for generation in each)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": proposed - accepted,
            },
        }

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
            "strengths": self.strengths,
        }

    def _chunk(
        self,
        index: int,
        *,
        reason: str | None = None,
        log_probs: dict[str, Any] | None = None,
        **content: Any,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": log_probs, "finish_reason": reason}
        chunk = {**self._head(self._chunk_object), "choices": [choice]}
        # As OpenAI's: null in all chunks but the last one, of a request that asks for it.
        return chunk | {"usage": None} if self.shows_usage else chunk

    def _log_probs(
        self, index: int, token_ids: Sequence[int], log_probs: Sequence[TokenLogProbs]
    ) -> dict[str, Any]:
        texts = self.texts
        pairs = list(zip(token_ids, log_probs, strict=False))
        if self.kind == "chat":
            return {
                "content": [
                    {
                        **self._token(token_id, scores.log_prob),
                        "base_logprob": _finite(scores.base_log_prob),
                        "top_logprobs": [self._token(*pair) for pair in scores.top],
                    }
                    for token_id, scores in pairs
                ],
                "refusal": None,
            }
        offsets = []
        for token_id, _ in pairs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(texts.text_of(token_id))
        return {
            "tokens": [texts.text_of(token_id) for token_id, _ in pairs],
            "token_logprobs": [_finite(scores.log_prob) for _, scores in pairs],
            "top_logprobs": [
                {texts.text_of(token_id): _finite(log_prob) for token_id, log_prob in scores.top}
                for _, scores in pairs
            ],
            "base_logprobs": [_finite(scores.base_log_prob) for _, scores in pairs],
            "text_offset": offsets,
        }

    def _token(self, token_id: int, log_prob: float) -> dict[str, Any]:
        return {
            "token": self.texts.text_of(token_id),
            "bytes": list(self.texts.bytes_of(token_id)),
            "logprob": _finite(log_prob),
        }


def _finite(log_prob: float) -> float:
    """A log-probability in JSON, which has no −∞; OpenAI writes this number for it."""
    return max(log_prob, -9999.0)


def _shown(token_ids: Sequence[int], generation: Generation | None) -> Sequence[int]:
    """The tokens that log-probabilities are shown of: not the stop id that ended the row."""
    ended = generation is not None and generation.finish_reason == "eos"
    return token_ids[:-1] if ended else token_ids
