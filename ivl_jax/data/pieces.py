"""Tokenises a text in pieces, each one as the continuation of the text before it.

In: the pieces of a text. Out: the tokens of each, with character offsets. A model that decodes
after the first pieces sees exactly their tokens: no token reaches across a cut, and a SentencePiece
tokenizer's space before the first word is not put before a piece in the middle of a text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ivl_jax.token_bytes import split_vocabulary


class PieceTokens(NamedTuple):
    """The tokens of one piece."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # of each token, in characters from the piece's start


class PieceEncoder:
    """Tokenises pieces of text with one tokenizer.

    Attributes:
        special_tokens: Id to text of the special and appended tokens.
        definition: The tokenizer as JSON: two encoders with the same definition encode alike.
    """

    def __init__(self, tokenizer: Any):
        self.special_tokens = split_vocabulary(tokenizer)[1]
        self.definition: str = tokenizer.backend_tokenizer.to_str()
        self._added = frozenset(tokenizer.backend_tokenizer.get_added_tokens_decoder())
        self._whole = _encoder(self.definition)
        bare, self._prefix = _without_prefix(json.loads(self.definition))
        self._bare = _encoder(json.dumps(bare)) if self._prefix != "none" else self._whole
        self._special_texts = tuple(
            sorted((text for text in self.special_tokens.values() if text.strip()), key=len)[::-1]
        )
        self._special_pattern = re.compile("|".join(map(re.escape, self._special_texts)) or "(?!)")

    def ends_with_special(self, text: str) -> bool:
        """Whether a text ends with a special token's text."""
        return text.endswith(self._special_texts)

    def special_at(self, text: str, position: int) -> str:
        """Returns the longest special token's text that stands at `position`, or an empty text."""
        match = self._special_pattern.match(text, position)
        return match[0] if match else ""

    def encode(self, texts: Sequence[Sequence[str]]) -> list[list[PieceTokens]]:
        """Tokenises several texts, each given as its pieces in order.

        Args:
            texts: The pieces of each text; no special token is added to them.

        Returns:
            For each text, the tokens of each of its pieces.
        """
        pieces = [piece for text in texts for piece in text]
        whole = iter(_tokens(self._whole, pieces))
        bare = iter(_tokens(self._bare, pieces) if self._prefix != "none" else [])
        results = []
        for text in texts:
            encoded = []
            for previous in [None, *text[:-1]]:
                tokens = next(whole)
                if self._prefix != "none":
                    tokens = self._continued(tokens, next(bare), previous)
                encoded.append(tokens)
            results.append(encoded)
        return results

    def _continued(
        self, whole: PieceTokens, bare: PieceTokens, previous: str | None
    ) -> PieceTokens:
        """A piece with a prefix where it has one after `previous`: of two encodings, or of both."""
        if previous is None:
            return whole
        if self._prefix == "first":
            return bare
        # The prefix stands at the start of every stretch between special tokens.
        if self.ends_with_special(previous):
            return whole
        cut_bare, cut_whole = self._first_added(bare.ids), self._first_added(whole.ids)
        return PieceTokens(
            ids=bare.ids[:cut_bare] + whole.ids[cut_whole:],
            offsets=bare.offsets[:cut_bare] + whole.offsets[cut_whole:],
        )

    def _first_added(self, ids: list[int]) -> int:
        """Where the first special or appended token stands."""
        return next((index for index, token in enumerate(ids) if token in self._added), len(ids))


def _encoder(definition: str) -> Tokenizer:
    """A tokenizer that neither cuts nor pads."""
    encoder = Tokenizer.from_str(definition)
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _tokens(encoder: Tokenizer, pieces: list[str]) -> list[PieceTokens]:
    encodings = encoder.encode_batch(pieces, add_special_tokens=False)
    return [PieceTokens(encoding.ids, encoding.offsets) for encoding in encodings]


def _without_prefix(definition: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The tokenizer without its prefix space, and where it puts one: "none", "first" or "every"."""
    where = "none"

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
