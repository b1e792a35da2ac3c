"""Tokenises a text in pieces, each as the continuation of the text before it.

In: the pieces of a text. Out: the tokens of each, with character offsets. A model that decodes
after the first pieces sees exactly their tokens: no token spans a cut, and a SentencePiece
tokenizer's space before the first word is not added before a piece in the middle of a text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from ivl_jax.text_codec import make_text_encoders, special_ids
from ivl_jax.token_bytes import split_vocabulary

# Unicode's White_Space property, which the tokenizers library uses.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_WORD = "In"  # stands for what follows a token
_TRIED_AT_MOST = 100  # added tokens


class PieceTokens(NamedTuple):
    """The tokens of one piece."""

    ids: list[int]
    parts: tuple[tuple[Encoding, slice], ...]  # where they come from
    begin: int = 0  # characters of the piece that the token before it has swallowed

    def offsets(self) -> list[tuple[int, int]]:
        """Returns where each token begins and ends, in characters from the piece's start."""
        return [
            (first + self.begin, end + self.begin)
            for encoding, part in self.parts
            for first, end in encoding.offsets[part]
        ]


class _Following(NamedTuple):
    """How a tokenizer reads the text after one of its added tokens."""

    prefix: bool  # with an added space, as at a text's start
    swallowed: frozenset[str]  # white space that becomes part of the token


class PieceEncoder:
    """Tokenises pieces of text with one tokenizer.

    Attributes:
        special_tokens: Id to text of the special and appended tokens.
        silent: Ids of those that stand for nothing in a text.
        blank: Ids of the ordinary tokens that are only white space.
        definition: The tokenizer as JSON: encoders with equal definitions encode equally.
        deviations: How they encode differently from the first version of this package.
    """

    def __init__(self, tokenizer: Any):
        backend = tokenizer.backend_tokenizer
        ordinary, self.special_tokens = split_vocabulary(tokenizer)
        self.silent = special_ids(tokenizer)
        self.blank = frozenset(
            index for index, spelled in enumerate(ordinary) if spelled and not spelled.strip()
        )
        self.definition: str = backend.to_str()
        self._added = backend.get_added_tokens_decoder()
        self._added_texts = _longest_first(token.content for token in self._added.values())
        self._stripping = {t.content for t in self._added.values() if t.rstrip and t.content}
        self._whole, self._bare, self._prefix = make_text_encoders(self.definition)
        self._after: dict[str, _Following] = {}
        special = _longest_first(text for text in self.special_tokens.values() if text.strip())
        self._special_texts = special
        self._special_pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.deviations = tuple(self._find_deviations())

    def ends_with_special(self, text: str) -> bool:
        """Whether a text ends with a special token's text."""
        return text.endswith(self._special_texts)

    def holds_special(self, text: str) -> bool:
        """Whether a text contains a special token's text."""
        return self._special_pattern.search(text) is not None

    def special_at(self, text: str, position: int) -> str:
        """Returns the longest special token's text at `position`, or an empty text."""
        match = self._special_pattern.match(text, position)
        return match[0] if match else ""

    def encode(self, texts: Sequence[Sequence[str]]) -> list[list[PieceTokens]]:
        """Tokenises several texts, each given as its pieces in order.

        Args:
            texts: The pieces of each text; no special token is added to them.

        Returns:
            For each text, the tokens of each of its pieces.
        """
        pieces, readings = [], []
        for text in texts:
            before = None
            for piece in text:
                kind, swallowed = self._reading(piece, before)
                readings.append((kind, swallowed))
                pieces.append(piece[swallowed:])
                before = (before or "") + piece
        kinds = [kind for kind, _ in readings]
        whole = iter(_encodings(self._whole, pieces, kinds, leave_out="bare"))
        bare = iter(_encodings(self._bare, pieces, kinds, leave_out="whole"))
        tokens = iter(
            self._joined(next(bare), next(whole), swallowed)
            if kind == "both"
            else _all_of(next(whole if kind == "whole" else bare), swallowed)
            for kind, swallowed in readings
        )
        return [[next(tokens) for _ in text] for text in texts]

    def _reading(self, piece: str, before: str | None) -> tuple[str, int]:
        """Which encoding continues the text before a piece, and how much of it is swallowed.

        The encoding is the whole one, the bare one, or parts of both: a prefix "first" is added
        only at a text's start, "every" at the start of each stretch between special tokens.
        """
        if before is None or (self._prefix == "none" and not self._stripping):
            return "whole", 0
        swallowed = 0
        token = self._last_added(before)
        if token is not None:
            after = self._following(token)
            swallowed = len(piece) - len(piece.lstrip("".join(after.swallowed) or "\0"))
            swallowed *= bool(after.swallowed)
            if after.prefix:
                return "whole", swallowed
        if self._prefix == "none":
            return "whole", swallowed
        if self._prefix == "first":
            return "bare", swallowed
        special = self._special_pattern.search(piece)
        return ("both" if special and special.end() < len(piece) else "bare"), swallowed

    def _last_added(self, before: str) -> str | None:
        """The added token that a text ends with, including white space that it swallows."""
        if before.endswith(self._added_texts):
            return next(text for text in self._added_texts if before.endswith(text))
        stripped = before.rstrip(_WHITE_SPACE)
        if not self._stripping or not stripped.endswith(self._added_texts):
            return None
        token = next(text for text in self._added_texts if stripped.endswith(text))
        between = set(before[len(stripped) :])
        return token if between <= self._following(token).swallowed else None

    def _following(self, token: str) -> _Following:
        """How the tokenizer reads the text after an added token, determined by trying it."""
        if token not in self._after:

            def behind(between: str) -> list[int]:
                ids = self._whole.encode(f"{token}{between}{_WORD}", add_special_tokens=False).ids
                places = [place for place, found in enumerate(ids) if found in self._added]
                return ids[places[-1] + 1 :] if places else []

            plain = behind("")
            at_start = self._whole.encode(_WORD, add_special_tokens=False).ids
            within = self._bare.encode(_WORD, add_special_tokens=False).ids
            strips = token in self._stripping
            self._after[token] = _Following(
                prefix=self._prefix == "every" and (plain != within or at_start == within),
                swallowed=frozenset(
                    space for space in _WHITE_SPACE if strips and plain and behind(space) == plain
                ),
            )
        return self._after[token]

    def _find_deviations(self) -> Iterator[str]:
        """How tokens with `rstrip`, or matched in normalised text, change later pieces."""
        if self._stripping:
            yield "swallowed white space"
        normalized = [t.content for t in self._added.values() if t.normalized and t.content.strip()]
        if self._prefix == "every" and not all(
            self._following(text).prefix for text in normalized[:_TRIED_AT_MOST]
        ):
            yield "no space behind normalised tokens"

    def _joined(self, bare: Encoding, whole: Encoding, begin: int) -> PieceTokens:
        """No prefix up to the first special token, prefixes from there on."""
        bare_ids, whole_ids = bare.ids, whole.ids
        up_to, from_on = (
            slice(0, self._first_added(bare_ids)),
            slice(self._first_added(whole_ids), None),
        )
        return PieceTokens(
            ids=bare_ids[up_to] + whole_ids[from_on],
            parts=((bare, up_to), (whole, from_on)),
            begin=begin,
        )

    def _first_added(self, ids: list[int]) -> int:
        """The position of the first special or appended token."""
        return next((index for index, token in enumerate(ids) if token in self._added), len(ids))


def _encodings(
    encoder: Tokenizer, pieces: Sequence[str], kinds: Sequence[str], *, leave_out: str
) -> list[Encoding]:
    """The encodings of all pieces but those of one kind."""
    chosen = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind != leave_out]
    return encoder.encode_batch(chosen, add_special_tokens=False)


def _all_of(encoding: Encoding, begin: int) -> PieceTokens:
    return PieceTokens(encoding.ids, ((encoding, slice(None)),), begin)


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted((text for text in texts if text), key=len, reverse=True))
