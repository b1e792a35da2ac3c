"""Exact next-byte distributions of token models, and their composition byte by byte: a reference.

In: models over tokens of any vocabularies. Out: log-probabilities of the next byte of a text, or of
its end. Slow, one text at a time; vocabulary maps are measured against it.

A text's first n bytes are covered by every token sequence that spells them and whose last token
ends at or beyond byte n. Their probabilities sum to that of the n bytes, and sums over those that
agree on byte n + 1 give its distribution.
"""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

END = 256
"""The symbol after the last byte: the text ends."""
SYMBOLS = 257

NextLogProbs = Callable[[Sequence[tuple[int, ...]]], Float[np.ndarray, "N V"]]
"""From the tokens of N texts, perhaps none, to log-probabilities of the token that follows each."""


@runtime_checkable
class ByteModel(Protocol):
    """A growing text, and what comes next in it."""

    def log_probs(self) -> Float[np.ndarray, "257"]:
        """Log-probabilities of the next byte, and of the text's end."""
        ...

    def push(self, byte: int) -> None:
        """Append a byte."""
        ...


class _Continuations(NamedTuple):
    """The tokens that begin with some bytes, as places in the sorted tokens."""

    first: int
    """The first that equals the bytes."""
    longer: int
    """The first that is longer than they are."""
    last: int
    """One beyond the last."""
    next_bytes: np.ndarray
    """[last − longer] the byte that follows these bytes in each longer token."""


class ByteVocabulary:
    """A vocabulary's tokens, sorted by their bytes.

    Args:
        token_bytes: by id, what a token stands for; empty for special tokens, which no text is
            spelled with.
        end_ids: tokens that end a text.
    """

    def __init__(self, token_bytes: Sequence[bytes], end_ids: Sequence[int]) -> None:
        ends = set(end_ids)
        pieces = sorted((b, i) for i, b in enumerate(token_bytes) if b and i not in ends)
        self.ids = np.array([token_id for _, token_id in pieces], np.int64)
        self.end_ids = np.array(sorted(ends), np.int64)
        self._spelled = [spelled for spelled, _ in pieces]
        self.continuations = functools.cache(self._continuations)

    def _continuations(self, beginning: bytes) -> _Continuations:
        length = len(beginning)
        first = bisect.bisect_left(self._spelled, beginning)
        longer = bisect.bisect_right(self._spelled, beginning)
        last = bisect.bisect_right(self._spelled, beginning, key=lambda piece: piece[:length])
        following = [piece[length] for piece in self._spelled[longer:last]]
        return _Continuations(first, longer, last, np.array(following, np.int64))


class _Path(NamedTuple):
    """Tokens that spell a text up to its last few bytes."""

    tokens: tuple[int, ...]
    log_weight: float
    """log p of these tokens."""
    rest: bytes
    """The bytes after them, which the next token has to begin with."""
    probs: np.ndarray
    """[N] p of each sorted token after them; together with `end` they sum to 1."""
    end: float
    """p that the text ends after them."""


class BytePaths:
    """A text under one token model: all token sequences that cover it.

    Their number may grow exponentially with the text, but nearly all probability is on a few: with
    `prune`, the least probable are dropped.

    Args:
        vocabulary: the model's.
        next_log_probs: the model, which continues a fixed prompt. Its special tokens other than
            ends are excluded, as if they had probability 0.
        prune: sequences with less than this share of the text's probability are dropped, except the
            most probable one that ends where the text ends; 0: none.

    Attributes:
        dropped: Upper bound of the share of probability that was dropped so far.
    """

    def __init__(
        self, vocabulary: ByteVocabulary, next_log_probs: NextLogProbs, *, prune: float = 0.0
    ) -> None:
        self.dropped = 0.0
        self._vocabulary, self._next_log_probs, self._prune = vocabulary, next_log_probs, prune
        self._paths = self._continued([((), 0.0)])

    def __len__(self) -> int:
        """The number of token sequences."""
        return len(self._paths)

    def log_probs(self) -> Float[np.ndarray, "257"]:
        """Log-probabilities of the next byte, and of the text's end at index `END`."""
        scale = max(path.log_weight for path in self._paths)
        mass = np.zeros(SYMBOLS)
        for path in self._paths:
            weight = np.exp(path.log_weight - scale)
            tokens = self._vocabulary.continuations(path.rest)
            longer = path.probs[tokens.longer : tokens.last]
            mass += weight * np.bincount(tokens.next_bytes, weights=longer, minlength=SYMBOLS)
            if not path.rest:
                mass[END] += weight * path.end
        with np.errstate(divide="ignore"):
            return np.log(mass / mass.sum())

    def push(self, byte: int) -> None:
        """Append a byte.

        Args:
            byte: 0 to 255.

        Raises:
            ValueError: no tokens spell the text.
        """
        begun: list[tuple[float, _Path]] = []
        complete: list[tuple[float, tuple[int, ...]]] = []
        for path in self._paths:
            rest = path.rest + bytes([byte])
            tokens = self._vocabulary.continuations(rest)
            mass = path.probs[tokens.longer : tokens.last].sum()
            if mass > 0:
                begun.append((path.log_weight + np.log(mass), path._replace(rest=rest)))
            complete += [
                (
                    path.log_weight + np.log(path.probs[place]),
                    (*path.tokens, int(self._vocabulary.ids[place])),
                )
                for place in range(tokens.first, tokens.longer)
                if path.probs[place] > 0
            ]
        weights = np.array([weight for weight, _ in (*begun, *complete)])
        if not weights.size:
            raise ValueError(f"no tokens spell the text after byte {byte}")
        shares = np.exp(weights - weights.max())
        shares /= shares.sum()
        kept = shares >= self._prune
        if complete:  # from where a token ends, any byte may follow
            kept[len(begun) + int(np.argmax(shares[len(begun) :]))] = True
        self.dropped += float(shares[~kept].sum())
        self._paths = [path for (_, path), keep in zip(begun, kept, strict=False) if keep]
        of_complete = zip(complete, kept[len(begun) :], strict=True)
        self._paths += self._continued(
            [(ids, weight) for (weight, ids), keep in of_complete if keep]
        )

    def _continued(self, texts: Sequence[tuple[tuple[int, ...], float]]) -> list[_Path]:
        """Run the model on token sequences that end where the text ends."""
        if not texts:
            return []
        log_probs = np.asarray(self._next_log_probs([ids for ids, _ in texts]), np.float64)
        spoken, ends = (
            np.exp(log_probs[:, ids]) for ids in (self._vocabulary.ids, self._vocabulary.end_ids)
        )
        total = spoken.sum(axis=1) + ends.sum(axis=1)
        return [
            _Path(ids, weight, b"", spoken[row] / total[row], ends[row].sum() / total[row])
            for row, (ids, weight) in enumerate(texts)
        ]


class ComposedBytes:
    """A base and the change that a post-training made to another model, composed byte by byte.

    log p = log p_base + α · (log p_tuned − log p_untuned), normalised. With the value network's own
    training base as `untuned` and their composition as `tuned`, the difference is what the value
    network adds in bytes: nothing where it is zero, and on its training base exactly `tuned`.

    Args:
        base: any model.
        tuned: the model with the change.
        untuned: the model without it.
        strength: α.
    """

    def __init__(
        self, base: ByteModel, tuned: ByteModel, untuned: ByteModel, *, strength: float = 1.0
    ) -> None:
        self._models = base, tuned, untuned
        self._strength = strength

    def log_probs(self) -> Float[np.ndarray, "257"]:
        """Log-probabilities of the next byte, and of the text's end at index `END`."""
        base, tuned, untuned = (model.log_probs() for model in self._models)
        # What neither model can say, the change does not concern.
        known = np.isfinite(tuned) & np.isfinite(untuned)
        change = np.where(known, tuned, 0.0) - np.where(known, untuned, 0.0)
        total = base + self._strength * change
        return total - np.logaddexp.reduce(total)

    def push(self, byte: int) -> None:
        """Append a byte."""
        for model in self._models:
            model.push(byte)


def byte_nll(model: ByteModel, text: bytes, *, ends: bool) -> float:
    """The negative log-likelihood of a text.

    Args:
        model: at the text's beginning; afterwards it is at its end.
        text: the text.
        ends: whether the text ends there.

    Returns:
        Nats, over all bytes, and the end if it ends.
    """
    total = 0.0
    for byte in text:
        total -= float(model.log_probs()[byte])
        model.push(byte)
    return total - float(model.log_probs()[END]) if ends else total


def greedy_bytes(model: ByteModel, *, limit: int) -> bytes:
    """The text of the most probable byte at each step.

    Args:
        model: at the text's beginning.
        limit: the most bytes.

    Returns:
        The bytes up to the end, or the limit.
    """
    text = bytearray()
    while len(text) < limit and (symbol := int(np.argmax(model.log_probs()))) != END:
        text.append(symbol)
        model.push(symbol)
    return bytes(text)
