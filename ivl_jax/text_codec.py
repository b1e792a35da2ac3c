"""One tokenizer in both directions: the bytes of its tokens, and how it tokenises part of a text.

In: a tokenizer with a fast backend. Out: the bytes of each token, and the tokens of a stretch of
text that begins a text, follows a special token, or continues other text: SentencePiece's space
before the first word must not appear before a stretch in the middle.
"""

import functools
import itertools
import json
import re
import string
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ivl_jax.tokenizer import TokenizerInfo

Prefix = Literal["none", "first", "every"]
"""Where a tokenizer adds a space: nowhere, at a text's start, or also after each special token."""
Before = Literal["start", "special", "text"]
"""What precedes a stretch of text: nothing, a special token, or other text."""


# Stretches of at most so many characters, of which so many are kept with their tokens: words recur.
_SHORT, _KEPT = 24, 1 << 16
# Steps of normalisation that change characters one by one, or compose them with what follows.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Lowercase", "StripAccents"}
# Beginnings and ends of words with which a tokenizer is tried.
_WORD_ENDS = (*map(chr, range(33, 127)), "é", "水", "🙂", "\u0301")
_WORD_BEGINNINGS = "x7.水"
# Characters of different kinds, between which tokens may always end, and what is put around two of
# them to try it.
_LETTERS, _DIGITS, _SIGNS = string.ascii_letters, string.digits, string.punctuation
_KINDS = (
    *itertools.permutations((_LETTERS, _DIGITS, _SIGNS), 2),
    (_LETTERS, "\n"),
    (_DIGITS, "\n"),
    (_DIGITS, _DIGITS),
)
_BEFORE_BREAK = (" x", " 7", " .", " 1234", " x\n")
_AFTER_BREAK = ("s", "7", ".", "'s", "890", "\n a", " \na")


class TextEncoders(NamedTuple):
    """The two ways in which one tokenizer reads text; neither truncates nor pads."""

    whole: Tokenizer
    """As it reads a whole text."""
    bare: Tokenizer
    """The same without its added space; the same object if it adds none."""
    prefix: Prefix
    """Where it adds a space."""


class ReadText(NamedTuple):
    """A stretch of text whose special tokens were read as such."""

    token_ids: list[int]
    """Tokens up to and including the last special one."""
    rest: str
    """The text after it, still to be tokenised; all of it if there is no special token."""


def make_text_encoders(definition: str, *, special: bool = True) -> TextEncoders:
    """Make a tokenizer's encoders; they are not changed afterwards, so threads may share them.

    Args:
        definition: the tokenizer as JSON (`backend_tokenizer.to_str()`).
        special: whether special tokens spelled out in a text are read as such, rather than as
            ordinary text.

    Returns:
        The encoders.
    """
    whole = _encoder(definition, special=special)
    bare, prefix = _without_prefix(json.loads(definition))
    if prefix == "none":
        return TextEncoders(whole, whole, prefix)
    return TextEncoders(whole, _encoder(json.dumps(bare), special=special), prefix)


def spoken_bytes(tokenizer: Any, info: TokenizerInfo) -> tuple[bytes, ...]:
    """What each token stands for in a text.

    Args:
        tokenizer: a transformers tokenizer with a fast backend.
        info: what identifies it, including the bytes of its tokens.

    Returns:
        By id, bytes: empty for special tokens and unused ids, the text itself for an appended word.
    """
    table = [ordinary or b"" for ordinary in info.ordinary_tokens]
    silent = special_ids(tokenizer)
    for token_id, text in info.special_tokens.items():
        table[token_id] = b"" if token_id in silent else text.encode()
    return tuple(table)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that stand for nothing in a text; appended words are not among them."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


class TextCodec:
    """One tokenizer's tokens as bytes, and text as its tokens; threads may share it.

    Args:
        tokenizer: a transformers tokenizer with a fast backend.
        info: what identifies it, including the bytes of its tokens.

    Attributes:
        info: As given.
        token_bytes: By id, what a token stands for: `spoken_bytes`.
        special_ids: Tokens that stand for nothing in a text.
        prefix: Where it adds a space.
        beginning: What it puts before every text: its begin-of-text token, or nothing.
        is_bpe: Whether its tokens come from merging neighbours, so that distant parts of a text do
            not influence each other.
        breaks_before_words: Whether the space between two words always begins a token, and what is
            before it never influences what comes after.
    """

    def __init__(self, tokenizer: Any, info: TokenizerInfo) -> None:
        definition = tokenizer.backend_tokenizer.to_str()
        parts = json.loads(definition)
        model = parts["model"]
        self.info = info
        self.special_ids = special_ids(tokenizer)
        self.token_bytes = spoken_bytes(tokenizer, info)
        begins = list(tokenizer("")["input_ids"][:1]) == [info.bos_id]
        self.beginning = (info.bos_id,) if begins and info.bos_id is not None else ()
        self.is_bpe = model["type"] == "BPE" and not model.get("dropout")
        # One pair per reading: a switch on a shared tokenizer would reach other threads' texts.
        self._encoders = make_text_encoders(definition, special=False)
        self._special_encoders = make_text_encoders(definition)
        self.prefix = self._encoders.prefix
        self._encode_short = functools.lru_cache(_KEPT)(self._encode)
        self.breaks_before_words = self.is_bpe and self._breaks_before_words(parts)
        # Appended words that are none within longer ones: whether they are depends on what follows.
        self._has_whole_words = any(
            added["single_word"] and not added["special"] for added in parts["added_tokens"]
        )

    @functools.cached_property
    def breaks(self) -> frozenset[str]:
        """Pairs of ASCII characters between which tokens always end.

        What is before such a place never influences what comes after it, nor the other way round.
        There are none unless the tokenizer breaks before words.
        """
        if not self.breaks_before_words or self._has_whole_words:
            return frozenset()
        spelled = np.frombuffer(b" ".join(self.token_bytes).lower(), np.uint8).astype(np.int32)
        spanned = set(np.unique(256 * spelled[:-1] + spelled[1:]).tolist())
        found = set[str]()
        for firsts, seconds in _KINDS:
            pairs = [
                first + second
                for first, second in itertools.product(firsts, seconds)
                if 256 * ord(first.lower()) + ord(second.lower()) not in spanned
            ]
            # Where digits are grouped, a group's beginning depends on how many there are.
            grouped = firsts == seconds and len(pairs) < len(firsts) * len(seconds)
            if not grouped and self._break_apart(pairs):
                found.update(pairs)
        return frozenset(found)

    def _break_apart(self, pairs: Sequence[str]) -> bool:
        """Whether tokens end between the characters of each pair; as with words, it is tried."""
        contexts = itertools.cycle(itertools.product(_BEFORE_BREAK, _AFTER_BREAK))
        each = [
            (before + pair[0], pair[1] + after)
            for pair, (before, after) in zip([*pairs, *pairs], contexts, strict=False)
        ]
        encode = functools.cache(functools.partial(self._encode, own_space=False))
        apart = [token for parts in each for part in parts for token in encode(part)]
        return encode("".join(itertools.chain(*each))) == apart

    @property
    def empty_id(self) -> int:
        """The token for an empty text: begin of text, else an end, else the unknown token."""
        ids = (self.info.bos_id, *self.info.eos_ids, self.info.unk_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    def encode(self, text: str, *, before: Before) -> list[int]:
        """Tokenise a stretch of text; special tokens spelled out in it are ordinary text.

        Args:
            text: the stretch.
            before: what precedes it.

        Returns:
            Token ids.
        """
        own_space = self._has_own_space(before)
        if len(text) <= _SHORT:
            return list(self._encode_short(text, own_space=own_space))
        return self._encode(text, own_space=own_space)

    def encode_special(self, text: str, *, before: Before) -> ReadText:
        """Tokenise a stretch of text up to the last special token spelled out in it.

        Args:
            text: the stretch.
            before: what precedes it.

        Returns:
            Token ids up to the last special token, and the text after it.
        """
        encoders = self._special_encoders
        encoder = encoders.whole if self._has_own_space(before) else encoders.bare
        encoding = encoder.encode(text, add_special_tokens=False)
        for place in reversed(range(len(encoding.ids))):
            start, end = encoding.offsets[place]
            # The unknown token is special too, but the text does not spell it out.
            named = self.info.special_tokens.get(encoding.ids[place]) == text[start:end].strip()
            if named and encoding.ids[place] in self.special_ids:
                return ReadText(encoding.ids[: place + 1], text[end:])
        return ReadText([], text)

    def _encode(self, text: str, *, own_space: bool) -> list[int]:
        encoder = self._encoders.whole if own_space else self._encoders.bare
        return encoder.encode(text, add_special_tokens=False).ids

    def _has_own_space(self, before: Before) -> bool:
        return before == "start" or (before == "special" and self.prefix == "every")

    def _breaks_before_words(self, definition: dict[str, Any]) -> bool:
        # Merging crosses a place only into a token that spans it.
        spaced = [token.decode(errors="replace") for token in self.token_bytes if b" " in token[1:]]
        if any(re.search(r"\S ", text) for text in spaced):
            return False
        if not _is_local(definition["normalizer"]):
            return False
        if any(added["rstrip"] and not added["special"] for added in definition["added_tokens"]):
            return False
        # What splits a text before merging cannot be known, but tried.
        each = itertools.product(_WORD_BEGINNINGS, _WORD_ENDS)
        first, *words = [f"{beginning}a{end}" for beginning, end in each]
        apart = self._encode(first, own_space=False)
        for word in words:
            apart += self._encode(f" {word}", own_space=False)
        return self._encode(" ".join([first, *words]), own_space=False) == apart


def _is_local(normalizer: dict[str, Any] | None) -> bool:
    """Whether what is before the space between two words is normalised apart from the rest."""
    if normalizer is None or normalizer["type"] in _LOCAL_NORMALIZERS:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_is_local, normalizer["normalizers"]))
    return normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "}


def _encoder(definition: str, *, special: bool) -> Tokenizer:
    """A tokenizer that neither truncates nor pads."""
    encoder = Tokenizer.from_str(definition)
    encoder.encode_special_tokens = not special
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _without_prefix(definition: dict[str, Any]) -> tuple[dict[str, Any], Prefix]:
    """The tokenizer without its added space, and where it adds one."""
    where: Prefix = "none"

    def visit(part: dict[str, Any] | None, children: str) -> dict[str, Any] | None:
        nonlocal where
        if part is None:
            return None
        if part["type"] == "Sequence":
            kept = [step for child in part[children] if (step := visit(child, children))]
            return {**part, children: kept} if kept else None
        if part["type"] == "Prepend":
            where = "every"
            return None
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            where = "every" if part["prepend_scheme"] == "always" else "first"
            return {**part, "prepend_scheme": "never"}
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            where = "every"
            return {**part, "add_prefix_space": False}
        return part

    normalizer = visit(definition["normalizer"], "normalizers")
    pre_tokenizer = visit(definition["pre_tokenizer"], "pretokenizers")
    return {**definition, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}, where
