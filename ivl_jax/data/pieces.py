"""Tokenises a text in pieces, each one as the continuation of the text before it.

In: the pieces of a text. Out: the tokens of each, with character offsets. A model that decodes
after the first pieces sees exactly their tokens: no token reaches across a cut, and a SentencePiece
tokenizer's space before the first word is not put before a piece in the middle of a text.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from ivl_jax.text_codec import make_text_encoders
from ivl_jax.token_bytes import split_vocabulary


class PieceTokens(NamedTuple):
    """The tokens of one piece."""

    ids: list[int]
    parts: tuple[tuple[Encoding, slice], ...]  # where they come from

    def offsets(self) -> list[tuple[int, int]]:
        """Returns where each token begins and ends, in characters from the piece's start."""
        return [offset for encoding, part in self.parts for offset in encoding.offsets[part]]


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
        self._whole, self._bare, self._prefix = make_text_encoders(self.definition)
        self._special_texts = tuple(
            sorted((text for text in self.special_tokens.values() if text.strip()), key=len)[::-1]
        )
        self._special_pattern = re.compile("|".join(map(re.escape, self._special_texts)) or "(?!)")

    def ends_with_special(self, text: str) -> bool:
        """Whether a text ends with a special token's text."""
        return text.endswith(self._special_texts)

    def holds_special(self, text: str) -> bool:
        """Whether a special token's text stands anywhere in a text."""
        return self._special_pattern.search(text) is not None

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
        kinds = [self._kind(piece, before) for text in texts for before, piece in _pairs(text)]
        pieces = [piece for text in texts for piece in text]
        whole = iter(_encodings(self._whole, pieces, kinds, leave_out="bare"))
        bare = iter(_encodings(self._bare, pieces, kinds, leave_out="whole"))
        tokens = iter(
            self._joined(next(bare), next(whole))
            if kind == "both"
            else _all_of(next(whole if kind == "whole" else bare))
            for kind in kinds
        )
        return [[next(tokens) for _ in text] for text in texts]

    def _kind(self, piece: str, before: str | None) -> str:
        """Which encoding continues the text before a piece: the whole, the bare, or both in part.

        A prefix "first" stands at a text's start only; "every" stands at the start of each stretch
        between special tokens.
        """
        if before is None or self._prefix == "none":
            return "whole"
        if self._prefix == "first":
            return "bare"
        if self.ends_with_special(before):
            return "whole"
        special = self._special_pattern.search(piece)
        return "both" if special and special.end() < len(piece) else "bare"

    def _joined(self, bare: Encoding, whole: Encoding) -> PieceTokens:
        """No prefix up to the first special token, prefixes from there on."""
        bare_ids, whole_ids = bare.ids, whole.ids
        up_to, from_on = (
            slice(0, self._first_added(bare_ids)),
            slice(self._first_added(whole_ids), None),
        )
        return PieceTokens(
            ids=bare_ids[up_to] + whole_ids[from_on], parts=((bare, up_to), (whole, from_on))
        )

    def _first_added(self, ids: list[int]) -> int:
        """Where the first special or appended token stands."""
        return next((index for index, token in enumerate(ids) if token in self._added), len(ids))


def _encodings(
    encoder: Tokenizer, pieces: Sequence[str], kinds: Sequence[str], *, leave_out: str
) -> list[Encoding]:
    """The encodings of all pieces but those of one kind."""
    chosen = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind != leave_out]
    return encoder.encode_batch(chosen, add_special_tokens=False)


def _all_of(encoding: Encoding) -> PieceTokens:
    return PieceTokens(encoding.ids, ((encoding, slice(None)),))


def _pairs(text: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """Each piece with the one before it."""
    return zip([None, *text[:-1]], text, strict=True)
