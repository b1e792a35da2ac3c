"""Token ids to text as they arrive: whole characters only, stop strings cut exactly.

In: token ids one at a time. Out: pieces of text that are final. Pure Python on the host; the pieces
do not depend on how many tokens arrive at once.
"""

import codecs
from collections.abc import Sequence

from ivl_jax.decoding.device.finish import FinishReason


class Detokenizer:
    """Turns token ids into text and never emits part of a UTF-8 character.

    Bytes that can no longer become a character come out as U+FFFD.

    Args:
        token_bytes: the bytes each id stands for; empty for special tokens. An id beyond the end
            (a padding row of the model) stands for nothing.
        strip_leading_space: drop one space at the very start, as SentencePiece tokenizers do at the
            beginning of a text.
    """

    def __init__(self, token_bytes: Sequence[bytes], *, strip_leading_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = strip_leading_space

    def push(self, token_id: int) -> str:
        """Take one token id; return the characters it completes, possibly none."""
        known = 0 <= token_id < len(self._token_bytes)
        return self._clean(self._decoder.decode(self._token_bytes[token_id] if known else b""))

    def finish(self) -> str:
        """Return what the bytes still held stand for: U+FFFD, or nothing."""
        return self._clean(self._decoder.decode(b"", final=True))

    def _clean(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Cuts a stream of text before the first stop string, also when pieces split the string.

    Text that may be the beginning of a stop string is held back until that is decided. When several
    stop strings end at the same character, the one that starts first wins.

    Args:
        stop: the strings; none of them empty.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not string for string in stop):
            raise ValueError(f'a stop string is empty (""): remove it; got {list(stop)}')
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found, or None."""

    def push(self, text: str) -> str:
        """Take a piece of text; return what is now certain to be kept. Nothing after a match."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        for position in range(len(text)):
            self._held += text[position]
            found = [string for string in self._stop if self._held.endswith(string)]
            if found:
                self.matched = max(found, key=len)
                kept, self._held = self._held.removesuffix(self.matched), ""
                return kept
        cut = len(self._held) - self._undecided()
        kept, self._held = self._held[:cut], self._held[cut:]
        return kept

    def finish(self) -> str:
        """Return the text still held back: nothing follows, so it is not a stop string."""
        kept, self._held = self._held, ""
        return kept

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        return next(
            (n for n in range(longest, 0, -1) if self._begins_stop(self._held[-n:])),
            0,
        )

    def _begins_stop(self, tail: str) -> bool:
        return any(string.startswith(tail) for string in self._stop)


class RowText:
    """What one row has generated: its token ids and its text, cut where it ends.

    Args:
        detokenizer: for this row alone.
        stop: the row's stop strings.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        """Generated ids; the last one is the stop id, or completes the stop string, if any."""
        self.finish: FinishReason = FinishReason.RUNNING
        """Why the row has ended, as the text shows it."""

    @property
    def text(self) -> str:
        """All text that is final."""
        return "".join(self._pieces)

    def push(self, token_ids: Sequence[int], finish: FinishReason) -> str:
        """Take newly generated ids.

        Args:
            token_ids: in order; ids after a stop string are ignored.
            finish: the row's state on device after these ids.

        Returns:
            The text that became final, possibly none.
        """
        if self.finish != FinishReason.RUNNING:
            return ""
        piece = ""
        for index, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            # A stop id ends the text and is not part of it, whatever it decodes to.
            if finish == FinishReason.EOS and index == len(token_ids) - 1:
                break
            piece += self._stop.push(self._detokenizer.push(token_id))
            if self._stop.matched is not None:
                finish = FinishReason.STOP_STRING
                break
        if finish != FinishReason.RUNNING:
            piece += self._stop.push(self._detokenizer.finish())
            if self._stop.matched is not None:
                finish = FinishReason.STOP_STRING
            piece += self._stop.finish()
        self.finish = finish
        self._pieces.append(piece)
        return piece
