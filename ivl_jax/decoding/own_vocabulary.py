"""How a value network with a vocabulary of its own reads what the base reads and writes.

In: the tokenizers of both, and special tokens paired by role. Out: prompts in both sides' tokens;
then, step by step, what each value network has to read (`OwnTokens`).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ivl_jax.buckets import bucket
from ivl_jax.composed.forward import OwnTokens
from ivl_jax.data.chat import ChatFormat, make_chat_format
from ivl_jax.data.formats import Message
from ivl_jax.data.templates import NAMED_TEMPLATES
from ivl_jax.decoding.speculative.mapped_rounds import OwnBlock
from ivl_jax.text_codec import TextCodec
from ivl_jax.vocabulary.retokenize import (
    RetokenizedText,
    Retokenizer,
    backward_pairs,
    forward_pairs,
)
from ivl_jax.vocabulary.special_tokens import SpecialPairs, base_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

_SMALLEST_CAPACITY = 64
# After a base token a value network reads 0 to 3 of its own as a rule: few widths, few programs.
_WIDTHS = (1, 4, 16)


@runtime_checkable
class OwnText(Protocol):
    """A growing text in the tokens of a value network with its own vocabulary."""

    tokens: list[int]
    """Its tokens so far, never empty; read only."""

    def fork(self) -> "OwnText":
        """An independent copy."""
        ...

    def push(self, source_ids: Sequence[int]) -> int:
        """Append tokens of the base; return how many of the first `tokens` did not change."""
        ...


@dataclass(frozen=True, eq=False)
class OwnVocabulary:
    """How a value network reads text, where its vocabulary is not the base's.

    Attributes:
        name: What messages call the value network.
        context: Tokens of its own that a row may hold.
        retokenizer: From the base's tokens to its own.
        tokenizer: Its tokenizer.
        chat_template: Its chat template: a name, `auto` or Jinja text.
        special_pairs: Special tokens paired by role: (role, base id, its own id).
        stop_ids: Base ids that stand for one of its ends.
    """

    name: str
    context: int
    retokenizer: Retokenizer = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    chat_template: str = field(repr=False)
    special_pairs: SpecialPairs
    stop_ids: tuple[int, ...]

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How dialogues become its own tokens."""
        return make_chat_format(self.tokenizer, template=self.chat_template)

    def read_prompt(
        self, token_ids: Sequence[int], messages: Sequence[Message] | None
    ) -> RetokenizedText:
        """Read a prompt.

        Args:
            token_ids: the prompt in the base's tokens.
            messages: the dialogue that they are, or None. A dialogue is read through the value
                network's own template, and what the base generates continues from it.

        Returns:
            The prompt in its own tokens, ready to grow.
        """
        if messages is None:
            return self.retokenizer.begin(token_ids)
        own = self.chat_format.encode_prompt(messages).tolist()
        return self.retokenizer.resume(own, source_ids=token_ids)


def make_own_vocabulary(
    base: TextCodec,
    value: TextCodec,
    special_pairs: SpecialPairs,
    *,
    name: str,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    value_stop_ids: Sequence[int],
) -> OwnVocabulary:
    """Describe how a value network reads text, where its vocabulary is not the base's.

    Args:
        base: the base's tokenizer.
        value: the value network's.
        special_pairs: special tokens paired by role, of the map between them.
        name: what messages call the value network.
        context: tokens of its own that a row may hold.
        tokenizer: its tokenizer.
        chat_template: its chat template.
        value_stop_ids: its own ids that end a text or a turn.

    Returns:
        The description.
    """
    return OwnVocabulary(
        name=name,
        context=context,
        retokenizer=Retokenizer(base, value, forward_pairs(special_pairs)),
        tokenizer=tokenizer,
        chat_template=chat_template,
        special_pairs=special_pairs,
        stop_ids=base_stop_ids(special_pairs, value_stop_ids),
    )


def base_chat_format(base: PreTrainedTokenizerBase, own: OwnVocabulary) -> ChatFormat:
    """How the base reads dialogues of a value network: the same text, special tokens by role.

    Args:
        base: the base's tokenizer.
        own: how the value network reads text.

    Returns:
        The value network's template over the base's tokens. Special tokens written out in it become
        those they are paired with; those that are not paired are ordinary text to the base.
    """
    template = own.chat_template
    if template == "auto":
        template = "tokenizer" if own.tokenizer.chat_template else "plain"
    if template in NAMED_TEMPLATES:
        return make_chat_format(base, template=template)
    text = own.tokenizer.get_chat_template() if template == "tokenizer" else template
    base_texts, own_texts = (
        codec.info.special_tokens for codec in (own.retokenizer.source, own.retokenizer.target)
    )
    paired = {
        own_texts[own_id]: base_texts[base_id]
        for own_id, base_id in backward_pairs(own.special_pairs).items()
    }
    written = "|".join(re.escape(token) for token in sorted(paired, key=len, reverse=True))
    if written:
        text = re.sub(written, lambda found: paired[found[0]], text)
    return make_chat_format(base, template=text)


def expected_slots(
    values: Sequence[OwnVocabulary], texts: Sequence[OwnText], *, new_tokens: int
) -> int:
    """Estimate the slots that a prompt will need in the caches of value networks; a bucket.

    Args:
        values: value networks with their own vocabularies.
        texts: the prompt as each of them reads it.
        new_tokens: base tokens that may be generated after it, at most.

    Returns:
        Slots (tokens); 0 without such networks. A row that needs more has the caches grow.
    """
    # Two tokenizers rarely differ by more than a quarter.
    more = new_tokens + new_tokens // 4
    return _slots(
        [
            min(len(text.tokens) + more, own.context)
            for own, text in zip(values, texts, strict=True)
        ],
        contexts=[own.context for own in values],
    )


class TextReader:
    """The rows of a batch as value networks with their own vocabulary read them, step by step.

    Args:
        values: these value networks.
        batch: rows on device; none of them has a text yet.
    """

    def __init__(self, values: Sequence[OwnVocabulary], *, batch: int) -> None:
        self._values = tuple(values)
        self._contexts = [own.context for own in values]
        # Of each network, each row's text; None: the row is free, or does not use the network.
        self._texts: list[list[OwnText | None]] = [[None] * batch for _ in values]
        # Tokens that a network's cache still holds of each row.
        self._read = [[0] * batch for _ in values]
        self._full = [False] * batch

    def slots(self) -> int:
        """Slots per row that the networks' caches need by now (tokens); a bucket."""
        lengths = [
            min(len(text.tokens), context)
            for texts, context in zip(self._texts, self._contexts, strict=True)
            for text in texts
            if text is not None
        ]
        return _slots(lengths, contexts=self._contexts)

    def admit(self, row: int, texts: Sequence[OwnText | None], *, is_read: bool = False) -> None:
        """Begin a prompt in a row, in place of what was there.

        Args:
            row: the row.
            texts: the prompt as each network reads it; copies grow here. None: the row does not use
                the network, which reads one token in it, over and over.
            is_read: whether the networks' caches hold it already.
        """
        for own_texts, read, text in zip(self._texts, self._read, texts, strict=True):
            own_texts[row] = None if text is None else text.fork()
            read[row] = len(text.tokens) if is_read and text is not None else 0
        self._full[row] = False

    def use(self, values: Sequence[OwnVocabulary]) -> None:
        """Read for other value networks from now on.

        Args:
            values: of which some may be those so far: what these have read stays. No row uses one
                that is new.
        """
        before = {id(own): index for index, own in enumerate(self._values)}
        kept = [before.get(id(own)) for own in values]
        rows = len(self._full)
        self._texts = [[None] * rows if i is None else self._texts[i] for i in kept]
        self._read = [[0] * rows if i is None else self._read[i] for i in kept]
        self._values, self._contexts = tuple(values), [own.context for own in values]

    def release(self, row: int) -> None:
        """Forget the text of a row that is free."""
        for own_texts, read in zip(self._texts, self._read, strict=True):
            own_texts[row], read[row] = None, 0
        self._full[row] = False

    def rearrange(self, rows: Sequence[int | None]) -> None:
        """Move rows, as they are moved on device.

        Args:
            rows: for each row from now on, the row that it was; None: it is free.
        """

        def moved(old: list[Any], nothing: Any) -> list[Any]:
            return [nothing if row is None else old[row] for row in rows]

        self._texts = [moved(texts, None) for texts in self._texts]
        self._read = [moved(read, 0) for read in self._read]
        self._full = moved(self._full, False)

    def push(self, new_ids: Mapping[int, Sequence[int]]) -> set[int]:
        """Take newly generated base tokens.

        Args:
            new_ids: by row, in order; perhaps none.

        Returns:
            The rows that have to end: a network's context is full.
        """
        for texts, read, context in zip(self._texts, self._read, self._contexts, strict=True):
            for row, ids in new_ids.items():
                text = texts[row]
                if ids and text is not None and not self._full[row]:
                    read[row] = min(read[row], text.push(ids))
                    self._full[row] = len(text.tokens) > context
        return {row for row, full in enumerate(self._full) if full}

    def end_beyond(self, slots: int) -> set[int]:
        """End the rows in which a network would need more slots than there may be.

        Args:
            slots: of a row of the networks' caches.

        Returns:
            As `push`: all rows that have to end.
        """
        for row, each in enumerate(zip(*self._texts, strict=True)):
            self._full[row] |= any(text is not None and len(text.tokens) > slots for text in each)
        return {row for row, full in enumerate(self._full) if full}

    def own_tokens(
        self, rows: Sequence[int], *, size: int, at_most: int | None = None
    ) -> tuple[OwnTokens, ...]:
        """Give what each network has to read now in some rows; its cache will then hold it.

        Args:
            rows: which rows.
            size: rows of the result, whose first ones these are; the rest only fill it.
            at_most: tokens per row, which is then the width; None: all that are left.

        Returns:
            NumPy arrays of one width, which comes from a small set; one `OwnTokens` per network.
        """
        if not self._texts:
            return ()
        pieces = [
            [self._piece(texts[row], read, row, at_most=at_most) for row in rows]
            for texts, read in zip(self._texts, self._read, strict=True)
        ]
        width = at_most or _width(max(len(piece) for each in pieces for _, piece in each))
        return tuple(_padded(each, size=size, width=width) for each in pieces)

    def own_block(
        self, proposals: np.ndarray, counts: Sequence[int], *, width: int, slots: int
    ) -> OwnBlock:
        """Give what each network has to read of all rows and of what is proposed for them.

        Args:
            proposals: [B K] base tokens that may follow.
            counts: how many of them are meant, per row.
            width: the base's tokens in the block, the last one included.
            slots: tokens that a row of the networks' caches holds.

        Returns:
            NumPy arrays; the caches then count as holding the texts without the proposals.
        """
        caps, networks, all_ends = list(counts), [], []
        for texts, read, context in zip(self._texts, self._read, self._contexts, strict=True):
            pieces, ends = [], np.zeros((len(counts), width), np.int32)
            for row, text in enumerate(texts):
                start, piece = self._piece(text, read, row, at_most=None)
                lengths = [len(piece)]
                if text is not None and not self._full[row]:
                    ahead = text.fork()
                    for proposed in proposals[row, : counts[row]].tolist():
                        before = len(ahead.tokens)
                        if ahead.push([proposed]) < before:
                            break
                        if len(ahead.tokens) > min(context, slots):
                            break
                        piece += ahead.tokens[before:]
                        lengths.append(len(piece))
                    caps[row] = min(caps[row], len(lengths) - 1)
                pieces.append((start, piece))
                ends[row] = lengths[-1] - 1
                ends[row, : len(lengths)] = np.asarray(lengths) - 1
            networks.append(pieces)
            all_ends.append(ends)
        longest = max(len(piece) for pieces in networks for _, piece in pieces)
        tokens = (_padded(pieces, size=len(counts), width=_width(longest)) for pieces in networks)
        return OwnBlock(tuple(tokens), tuple(all_ends), np.asarray(caps, np.int32))  # pyright: ignore[reportArgumentType]

    def _piece(
        self, text: OwnText | None, read: list[int], row: int, *, at_most: int | None
    ) -> tuple[int, list[int]]:
        """Where a row's unread tokens begin, and what they are; at least the last one is read."""
        if text is None:
            return 0, [0]
        if self._full[row]:
            return 0, text.tokens[:1]
        start = min(read[row], len(text.tokens) - 1)
        end = len(text.tokens) if at_most is None else min(start + at_most, len(text.tokens))
        read[row] = end
        return start, text.tokens[start:end]


def _width(longest: int) -> int:
    few = (width for width in _WIDTHS if width >= longest)
    return next(few, bucket(longest, smallest=_WIDTHS[-1]))


def _slots(lengths: Sequence[int], *, contexts: Sequence[int]) -> int:
    if not contexts:
        return 0
    return bucket(max(lengths, default=0), smallest=_SMALLEST_CAPACITY, largest=max(contexts))


def _padded(pieces: Sequence[tuple[int, list[int]]], *, size: int, width: int) -> OwnTokens:
    # Python lists become one array: an assignment per row would take several times as long.
    filling = [(0, [0])] * (size - len(pieces))
    starts, tokens = zip(*pieces, *filling, strict=True)
    counts = [len(piece) for piece in tokens]
    rows = [piece + [0] * (width - len(piece)) for piece in tokens]
    return OwnTokens(*(np.array(each, np.int32) for each in (rows, starts, counts)))  # pyright: ignore[reportArgumentType]
