"""What requests have generated so far, as callers hear of it.

In: `News` of a request's row. Out: its `Progress`: text that has become final, tokens, at the end a
`Generation`.
"""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from ivl_jax.decoding.device.finish import FinishReason
from ivl_jax.decoding.entries import Entry, News
from ivl_jax.decoding.generation import Generation, TokenLogProbs
from ivl_jax.decoding.streaming import RowText

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """What one request has generated since the last step."""

    id: int
    """The request, as `Engine.submit` returned it."""
    piece: str
    """Text that has become final, perhaps none."""
    token_ids: tuple[int, ...]
    """New tokens."""
    log_probs: tuple[TokenLogProbs, ...]
    """Of these tokens, where the request asks for them; else none."""
    generation: Generation | None
    """The whole generation, once the request has ended."""

    @property
    def is_new(self) -> bool:
        """Whether there is anything to hear."""
        return bool(self.token_ids or self.piece or self.generation)


@dataclass
class RunningRequest:
    """A request that runs, and what it has generated so far.

    Attributes:
        entry: The request.
        text: Its text.
        seen: Tokens that the caller knows.
        log_probs: Of these, where the request asks for them.
    """

    entry: Entry
    text: RowText
    seen: int = 0
    log_probs: list[TokenLogProbs] = field(default_factory=list)

    def take(self, news: News) -> Progress:
        """Take what its row has generated.

        Args:
            news: of the row.

        Returns:
            What is new for the caller; with the generation, the request has ended.
        """
        piece = self.text.push(news.token_ids, news.finish)
        new = tuple(self.text.token_ids[self.seen :])
        log_probs = tuple(news.log_probs[: len(new)])
        self.seen += len(new)
        self.log_probs += log_probs
        ended = self.text.finish != FinishReason.RUNNING
        return Progress(news.id, piece, new, log_probs, self._generation(news) if ended else None)

    def _generation(self, news: News) -> Generation:
        text, prompt = self.text, self.entry.prompt
        error = news.error if text.finish == FinishReason.ERROR else None
        if error is not None:
            logger.error("request %d: %s", news.id, error)
        asked = prompt.options.log_probs is not None
        return Generation(
            text=text.text,
            token_ids=tuple(text.token_ids),
            finish_reason=text.finish.name.lower(),
            prompt_tokens=len(prompt.token_ids),
            error=error,
            log_probs=tuple(self.log_probs) if asked else None,
            proposed_tokens=news.proposed,
            accepted_tokens=news.accepted,
        )
