"""Re-tokenises a growing text from one tokenizer's tokens to another's.

In: source tokens (those of the base, as they are generated). Out: target tokens (what a value
network with another vocabulary reads), always equal to tokenising the whole text anew, and how many
of them are unchanged since the previous step.

Special tokens are paired by role, and no token spans one. Text that ends inside a UTF-8 character
is read up to that character; bytes that can no longer complete one become U+FFFD, as in the output.
"""

import codecs
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ivl_jax.text_codec import Before, TextCodec
from ivl_jax.vocabulary.special_tokens import SpecialPairs

# The tail that is tokenised anew at each step: the last word where words are tokenised apart (or
# what is after its last sign or digits), else between one and two times this many tokens. With 32,
# and no words, a step of 32 rows took 9 ms.
_TAIL_TOKENS = 8
# Places at which a cut of the tail is tried, from the newest backwards.
_CUTS_TRIED = 8
# Words of at most so many characters, and what follows them, recur: how many are kept.
_SHORT, _KEPT = 24, 1 << 16


class GrownWord(NamedTuple):
    """What becomes of a text's last word when text follows it; the same wherever the word is."""

    kept: int
    """Tokens of the word that do not change."""
    added: list[int]
    """Tokens after these."""
    before: int
    """Tokens before those of the word that is then the last one."""
    word: str
    """That word: all of the old one and the new text if no other word begins in it."""


@dataclass(frozen=True)
class Retokenizer:
    """From one tokenizer's tokens to another's.

    Attributes:
        source: The tokenizer of the tokens that come in.
        target: The tokenizer of the tokens that go out.
        pairs: Target id of each special source token that is read as a special token. The source's
            begin of text, as the very first token, always becomes the target's. Other special
            tokens stand for nothing.
    """

    source: TextCodec
    target: TextCodec
    pairs: Mapping[int, int]

    def __post_init__(self) -> None:
        # Tables that take 0.1 s: made here, not during the first step.
        _ = self.ordinary_texts, self.target.breaks

    def begin(self, source_ids: Sequence[int]) -> "RetokenizedText":
        """Start from a prompt.

        Special tokens of the target that the prompt's text spells out are read as such; in text
        pushed later they are ordinary text.

        Args:
            source_ids: the prompt; may be empty.

        Returns:
            The prompt as the target reads it: with its own begin-of-text token if it has one, and
            never empty.
        """
        first = self.pair(source_ids[0], first=True) if source_ids else None
        beginning = self.target.beginning
        opened = [] if beginning == (first,) else list(beginning)
        text = RetokenizedText(self, opened, before="start", strip=self.source.prefix != "none")
        text.push(source_ids, is_prompt=True)
        return text

    def resume(self, target_ids: Sequence[int], *, source_ids: Sequence[int]) -> "RetokenizedText":
        """Continue a prompt given in both tokenizers' tokens, which never change.

        Args:
            target_ids: the prompt as the target reads it, not empty.
            source_ids: as the source reads it, not empty.

        Returns:
            The prompt; what is pushed continues it.
        """
        strip = self.source.prefix == "every" and source_ids[-1] in self.source.special_ids
        before = "special" if target_ids[-1] in self.target.special_ids else "text"
        return RetokenizedText(self, list(target_ids), before=before, strip=strip)

    def pair(self, source_id: int, *, first: bool) -> int | None:
        """The special target token that a source token is read as; None if there is none.

        Args:
            source_id: the source token.
            first: whether it is the first of its text.
        """
        begins = self.source.info.bos_id, self.target.info.bos_id
        if first and source_id == begins[0] and begins[1] is not None:
            return begins[1]
        return self.pairs.get(source_id)

    @functools.cached_property
    def ordinary_texts(self) -> tuple[str, ...]:
        """By source id, the text of a token; empty if it has none of its own.

        Special tokens have none, and neither have those whose bytes are not whole characters.
        """
        texts = [spelled.decode(errors="replace") for spelled in self.source.token_bytes]
        for source_id, spelled in enumerate(self.source.token_bytes):
            special = source_id in self.source.special_ids or source_id in self.pairs
            if special or texts[source_id].encode() != spelled:
                texts[source_id] = ""
        return tuple(texts)

    def begins_apart(self, text: str, *, after: str) -> bool:
        """Whether what follows a word is tokenised apart from it, as the next word is.

        Args:
            text: what follows, not empty.
            after: the word's last character.
        """
        if text[0] != " ":
            return after + text[0] in self.target.breaks
        return text.rfind(" ") == 0 and not (text[1:2] or " ").isspace() and not after.isspace()

    @functools.cached_property
    def grow_word(self) -> Callable[[str, str], GrownWord]:
        """What becomes of a last word when a text follows, where words are read apart."""

        @functools.lru_cache(_KEPT)
        def grown(word: str, text: str) -> GrownWord:
            encode = functools.partial(self.target.encode, before="text")
            whole = word + text
            last = _last_word(whole)
            head = encode(whole[: len(whole) - len(last)])
            found = head + encode(last) if last else head
            kept = _common_length(encode(word), found)
            return GrownWord(kept, found[kept:], len(head) if last else 0, last or whole)

        return grown


def forward_pairs(pairs: SpecialPairs) -> dict[int, int]:
    """From base ids to value ids.

    Args:
        pairs: (role, base id, value id), as in a map's metadata.

    Returns:
        Value id of each base id.
    """
    return {base_id: value_id for _, base_id, value_id in pairs}


def backward_pairs(pairs: SpecialPairs) -> dict[int, int]:
    """From value ids to base ids.

    Args:
        pairs: (role, base id, value id). One value token may have several roles (GPT-2's begins and
            ends a text): a pair by hand takes precedence, then a turn end, then an end of text;
            among several, the lowest base id.

    Returns:
        Base id of each value id.
    """
    order = ("begin", "same name", "end", "turn end", "by hand")
    by_role = sorted(pairs, key=lambda pair: (order.index(pair[0]), -pair[1]))
    return {value_id: base_id for _, base_id, value_id in by_role}


class RetokenizedText:
    """A growing text in the target's tokens; made by a `Retokenizer`.

    Only the last tokens are tokenised anew at each step. The result equals tokenising everything:
    byte-pair merging yields a sequence exactly if it yields each pair of neighbours in it, so
    tokens before the tail stay as long as the tail's first token does (and pre-tokenizers look
    ahead less far than the tail is long). If that token changes, and with other kinds of
    tokenizers, all text since the last special token is tokenised anew.

    Attributes:
        tokens: Target tokens of the text so far, never empty; read only.
    """

    def __init__(
        self, retokenizer: Retokenizer, pinned: list[int], *, before: Before, strip: bool
    ) -> None:
        self.tokens = pinned
        self._retokenizer = retokenizer
        # Bytes that begin a character.
        self._pending = b""
        # Whether to remove the space that the source's tokenizer puts before the next text.
        self._strip = strip
        self._open(before)

    def fork(self) -> "RetokenizedText":
        """An independent copy."""
        copy = object.__new__(RetokenizedText)
        copy.__dict__.update(self.__dict__)
        copy.tokens = list(self.tokens)
        copy._stretch = list(self._stretch)
        return copy

    def push(self, source_ids: Sequence[int], *, is_prompt: bool = False) -> int:
        """Append source tokens.

        Args:
            source_ids: in order; may be empty.
            is_prompt: whether special tokens of the target that their text spells out are read as
                such.

        Returns:
            How many of the first `tokens` did not change.
        """
        rules = self._retokenizer
        if self._is_word and len(source_ids) == 1 and not (self._pending or self._strip):
            (source_id,) = source_ids
            known = 0 <= source_id < len(rules.ordinary_texts)
            text = rules.ordinary_texts[source_id] if known else ""
            if text and not is_prompt:
                return self._grow_word(text)
        unchanged, text = len(self.tokens), ""
        for place, source_id in enumerate(source_ids):
            paired = rules.pair(source_id, first=is_prompt and place == 0)
            if paired is not None:
                text += self._decode(b"", final=True)
                unchanged = min(unchanged, self._grow(text, is_prompt=is_prompt))
                self._pin(paired)
                text = ""
            else:
                text += self._spoken(source_id)
        unchanged = min(unchanged, self._grow(text, is_prompt=is_prompt))
        if not self.tokens:
            self.tokens.append(rules.target.empty_id)
            self._open("start")
        return unchanged

    def _spoken(self, source_id: int) -> str:
        """The text that a source token completes."""
        source = self._retokenizer.source
        known = 0 <= source_id < len(source.token_bytes)
        if source_id in source.special_ids:
            self._strip = self._strip or source.prefix == "every"
        return self._decode(source.token_bytes[source_id] if known else b"", final=False)

    def _decode(self, spelled: bytes, *, final: bool) -> str:
        spelled = self._pending + spelled
        text, read = codecs.utf_8_decode(spelled, "replace", final)
        self._pending = spelled[read:]
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def _pin(self, special: int) -> None:
        """Add a special token, which no other token can span."""
        rules = self._retokenizer
        opens_text = self._at_start and not self.tokens and special == rules.target.info.bos_id
        self.tokens.append(special)
        prefix = rules.source.prefix
        self._strip = prefix == "every" or (opens_text and prefix == "first")
        self._open("start" if opens_text else "special")

    def _open(self, before: Before) -> None:
        """Begin a stretch of text at the end of the tokens."""
        self._at_start = before == "start"
        self._stretch_before: Before = before
        self._stretch_start = len(self.tokens)
        self._stretch: list[str] = []
        self._read_from(self._stretch_start, "", before)

    def _read_from(self, fixed: int, tail: str, before: Before) -> None:
        """Set the tail to `tail`, whose tokens begin at `fixed`."""
        self._fixed, self._tail = fixed, tail
        self._before: Before = before
        # Whether the tokens before the tail stay whatever becomes of it.
        self._is_word = False
        self._cut_beyond = 2 * _TAIL_TOKENS

    def _grow(self, text: str, *, is_prompt: bool) -> int:
        """Append text; return how many tokens did not change."""
        if is_prompt:
            read = self._retokenizer.target.encode_special(text, before=self._before)
            if read.token_ids:
                self.tokens += read.token_ids
                self._open("special")
            text = read.rest
        if not text:
            return len(self.tokens)
        return self._grow_word(text) if self._is_word else self._grow_tail(text)

    def _grow_tail(self, text: str) -> int:
        """Append text to the tail, whatever it is; return how many tokens did not change."""
        target = self._retokenizer.target
        self._at_start = False
        self._stretch.append(text)
        self._tail += text
        word = _last_word(self._tail) if target.breaks_before_words else ""
        if word and len(word) == len(text):  # nothing before it has changed
            same = len(self.tokens)
            self.tokens += target.encode(word, before="text")
            self._begin_word(same, word)
            return same
        head, rest = self._encode_tail(word)
        first = self.tokens[self._fixed : self._fixed + 1]
        if not self._is_word and self._fixed > self._stretch_start and head[:1] != first:
            # The change reaches back to the beginning of the tail, perhaps further.
            self._read_from(self._stretch_start, "".join(self._stretch), self._stretch_before)
            head, rest = self._encode_tail(word)
        found = head + rest
        same = self._fixed + _common_length(self.tokens[self._fixed :], found)
        self.tokens[self._fixed :] = found
        if word:
            self._begin_word(self._fixed + len(head), word)
        elif len(found) > self._cut_beyond:
            self._cut(found)
        return same

    def _grow_word(self, text: str) -> int:
        """Append text to the tail, which is a word; return how many tokens did not change."""
        rules = self._retokenizer
        if rules.begins_apart(text, after=self._tail[-1]):
            self._stretch.append(text)
            same = len(self.tokens)
            self.tokens += rules.target.encode(text, before="text")
            self._begin_word(same, text)
            return same
        if len(self._tail) + len(text) > _SHORT:
            return self._grow_tail(text)
        self._stretch.append(text)
        kept, added, before, word = rules.grow_word(self._tail, text)
        same = self._fixed + kept
        self.tokens[same:] = added
        if before:
            self._begin_word(self._fixed + before, word)
            return same
        self._tail = word
        if len(self.tokens) - self._fixed > self._cut_beyond:
            self._cut(self.tokens[self._fixed :])
        return same

    def _encode_tail(self, word: str) -> tuple[list[int], list[int]]:
        """The tokens of the tail up to its last word, if it has one, and those of that word."""
        target = self._retokenizer.target
        head = target.encode(self._tail[: len(self._tail) - len(word)], before=self._before)
        return head, target.encode(word, before="text") if word else []

    def _begin_word(self, fixed: int, word: str) -> None:
        """Set the tail to a word, or a part of one, that is tokenised apart from what is before."""
        self._read_from(fixed, word, "text")
        self._is_word = True

    def _cut(self, found: list[int]) -> None:
        """Move the tail's beginning to a later place that gives the same tokens by itself."""
        target = self._retokenizer.target
        self._cut_beyond = 2 * len(found)
        if not target.is_bpe:
            return
        whole = self._tail.encode()
        newest = len(found) - _TAIL_TOKENS
        for place in range(newest, newest - _CUTS_TRIED, -1):
            head = b"".join([target.token_bytes[token_id] for token_id in found[:place]])
            if not whole.startswith(head) and self._before != "text":
                head = head.removeprefix(b" ")
            # The bytes differ if a normaliser changed the text, or a character was unknown.
            if not whole.startswith(head) or (whole[len(head)] & 0xC0) == 0x80:
                continue
            tail = whole[len(head) :].decode()
            if target.encode(tail, before="text") == found[place:]:
                self._read_from(self._fixed + place, tail, "text")
                return


def _last_word(text: str) -> str:
    """The last word that follows another, with its space; empty if there is none."""
    end = len(text) - 1  # the last character may be a space whose word is still to come
    while (place := text.rfind(" ", 1, end)) > 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return text[place:]
        end = place
    return ""


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
