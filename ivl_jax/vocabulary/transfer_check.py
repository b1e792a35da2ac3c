"""What a vocabulary map will not transfer: how the base's tokens in a text fare under it.

In: a map, both tokenizers, texts. Out: counts, examples and a verdict per kind of text.

A value logit reaches a base token as the value network means it only if the value network, in its
own tokens, begins at that byte the very token that the map takes the logit from. A projection takes
it from several: only the weight on that one token counts.
"""

import enum
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ivl_jax.tokenizer import TokenizerInfo
from ivl_jax.vocabulary.alignment import NamedTokenizer, tokenise
from ivl_jax.vocabulary.byte_offsets import partners
from ivl_jax.vocabulary.mapping import MapMetadata, VocabularyMap, total_weights

Kind = Literal["digits", "white space", "code", "CJK", "words", "other"]
Verdict = Literal["good", "partial", "poor"]

GOOD, PARTIAL = 0.9, 0.5
"""The least shares of tokens that transfer for the verdicts `good` and `partial`."""
_EXAMPLES = 5
_MOSTLY = 0.5
_TINY = 1e-30  # in place of the weight of an unmapped token

# The first that matches any of a token's characters decides.
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("CJK", re.compile("[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")),
    ("digits", re.compile(r"\d")),
    ("code", re.compile(r"[_{}\[\]()<>=+*/%&|^~@#\\`$-]|[a-z][A-Z]|;$|:$")),
    ("words", re.compile(r"[^\W\d_]|[.,!?;:'\"]")),
)


class Outcome(enum.Enum):
    """What becomes of the value network's opinion on one base token of a text."""

    TRANSFERS = "transfers"
    """The map takes half of the logit, or more, from the token that the value network begins."""
    UNMAPPED = "unmapped"
    """The map has no entry: the base's logit stays as it is."""
    NO_START = "no token begins there"
    """The value network's own tokens go past that byte: it never predicts what comes there."""
    OTHER_TOKEN = "another token"
    """The map takes more than half of the logit from tokens that the value network does not begin
    there."""


class Example(NamedTuple):
    """One base token that does not transfer."""

    token: str
    """The base token, in readable form."""
    outcome: Outcome
    """Why."""
    count: int
    """How often this occurs in the text."""
    mapped_to: tuple[str, ...]
    """The value tokens that the map takes the logit from, the heaviest first."""
    value_token: str | None
    """The token that the value network begins there."""
    share: float
    """How much of the map's weight is on that token, 0 to 1."""


@dataclass(frozen=True)
class KindReport:
    """How the base's tokens of one kind fare.

    Attributes:
        kind: Which tokens.
        counts: Occurrences by outcome.
        transferred_tokens: Occurrences, each counted as the share of its weight that is on the
            token that the value network begins there.
        mean_weight: Mean weight, of the tokens that transfer, on the one that is begun, 0 to 1.
        examples: The most frequent tokens that do not transfer.
    """

    kind: Kind
    counts: Mapping[Outcome, int]
    transferred_tokens: float
    mean_weight: float
    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        """Occurrences of such tokens."""
        return sum(self.counts.values())

    @property
    def transferred(self) -> float:
        """The share of them that transfers, 0 to 1."""
        return self.transferred_tokens / max(self.tokens, 1)

    @property
    def verdict(self) -> Verdict:
        """How well this kind of text transfers."""
        return _verdict(self.transferred)


@dataclass(frozen=True)
class TransferReport:
    """What a map transfers on some texts.

    Attributes:
        kinds: By kind of token, those that occur.
        paired: (role, base token, value token) of special tokens.
        unpaired: Special tokens of the base that are paired with none.
        base_ends_paired: Whether one of the base's ends of text is paired, so that answers can end
            where the value network ends them.
        texts: Texts that were read.
        unequal_texts: Further texts, left out since the tokenizers do not decode them to the same
            bytes.
    """

    kinds: tuple[KindReport, ...]
    paired: tuple[tuple[str, str, str], ...]
    unpaired: tuple[str, ...]
    base_ends_paired: bool
    texts: int
    unequal_texts: int

    @property
    def transferred(self) -> float:
        """The share of all the text's tokens that transfers, 0 to 1."""
        tokens = sum(report.tokens for report in self.kinds)
        moved = sum(report.transferred_tokens for report in self.kinds)
        return moved / max(tokens, 1)

    @property
    def verdict(self) -> Verdict:
        """How well the map works on these texts; poor where no answer could end."""
        return _verdict(self.transferred) if self.base_ends_paired else "poor"

    def to_json(self) -> dict[str, Any]:
        """The report, ready for `json.dumps`."""
        return {
            "verdict": self.verdict,
            "transferred": self.transferred,
            "texts": self.texts,
            "unequal_texts": self.unequal_texts,
            "kinds": {
                report.kind: {
                    "verdict": report.verdict,
                    "tokens": report.tokens,
                    "transferred": report.transferred,
                    "mean_weight": report.mean_weight,
                    "counts": {outcome.value: report.counts[outcome] for outcome in Outcome},
                    "examples": [
                        example._asdict() | {"outcome": example.outcome.value}
                        for example in report.examples
                    ],
                }
                for report in self.kinds
            },
            "special_tokens": {
                "paired": [list(pair) for pair in self.paired],
                "unpaired": list(self.unpaired),
                "base_ends_paired": self.base_ends_paired,
            },
        }


def check_transfer(
    vocabulary_map: VocabularyMap,
    metadata: MapMetadata,
    base: NamedTokenizer,
    value: NamedTokenizer,
    texts: Sequence[str],
) -> TransferReport:
    """Find what a map will not transfer.

    Args:
        vocabulary_map: the map.
        metadata: of the map, which fits both tokenizers (`check_vocabulary_map`).
        base: the base's tokenizer.
        value: the value network's tokenizer.
        texts: text of the kind that the models will read.

    Returns:
        The report.
    """
    index, weight = (np.asarray(a).reshape(len(a), -1) for a in vocabulary_map)
    total = total_weights(vocabulary_map)
    tables = {
        "value_bytes": value.info.ordinary_tokens,
        "base_bytes": base.info.ordinary_tokens,
    }

    def taken(base_id: int, value_id: int) -> float:
        """The weight with which a base token takes its logit from a value token."""
        return float(weight[base_id][index[base_id] == value_id].sum()) if value_id >= 0 else 0.0

    counts: dict[Kind, Counter[tuple[Outcome, int, int]]] = {}
    unequal = 0
    rows = (tokenise(named.tokenizer, texts) for named in (base, value))
    for base_row, value_row in zip(*rows, strict=True):
        met = partners(value_row, base_row, **tables)
        if met is None:
            unequal += 1
            continue
        hits = index[met.base_ids] == met.value_ids[:, None]
        reached = (weight[met.base_ids] * hits).sum(axis=1)
        shares = reached / np.maximum(total[met.base_ids], _TINY)
        places = zip(met.base_ids.tolist(), met.value_ids.tolist(), shares.tolist(), strict=True)
        for place, (base_id, value_id, share) in enumerate(places):
            kind = _kind(_characters(met.text, int(met.start[place]), int(met.end[place])))
            outcome = _outcome(mapped=bool(total[base_id] > 0), begun=value_id >= 0, share=share)
            counts.setdefault(kind, Counter())[outcome, base_id, value_id] += 1

    def example(outcome: Outcome, base_id: int, value_id: int, count: int) -> Example:
        heaviest = np.argsort(-weight[base_id], kind="stable")
        mapped = [int(index[base_id][one]) for one in heaviest if weight[base_id][one] > 0]
        return Example(
            readable(base.info, base_id),
            outcome,
            count,
            tuple(readable(value.info, one) for one in mapped),
            readable(value.info, value_id) if value_id >= 0 else None,
            taken(base_id, value_id) / max(float(total[base_id]), _TINY),
        )

    reports = []
    for kind, seen in sorted(counts.items(), key=lambda item: -item[1].total()):
        outcomes = Counter(dict.fromkeys(Outcome, 0))
        weights = transferred = 0.0
        for (outcome, base_id, value_id), count in seen.items():
            outcomes[outcome] += count
            reached = count * taken(base_id, value_id)
            weights += reached * (outcome is Outcome.TRANSFERS)
            transferred += reached / max(float(total[base_id]), _TINY)
        failed = [(k, n) for k, n in seen.most_common() if k[0] is not Outcome.TRANSFERS]
        reports.append(
            KindReport(
                kind,
                outcomes,
                transferred,
                weights / max(outcomes[Outcome.TRANSFERS], 1),
                tuple(example(*key, count) for key, count in failed[:_EXAMPLES]),
            )
        )
    pairs = metadata.special_pairs
    paired_ids = {base_id for _, base_id, _ in pairs}
    return TransferReport(
        kinds=tuple(reports),
        paired=tuple(
            (role, readable(base.info, base_id), readable(value.info, value_id))
            for role, base_id, value_id in pairs
        ),
        unpaired=tuple(t for i, t in base.info.special_tokens.items() if i not in paired_ids),
        base_ends_paired=not paired_ids.isdisjoint(base.info.eos_ids),
        texts=len(texts) - unequal,
        unequal_texts=unequal,
    )


def readable(info: TokenizerInfo, token_id: int) -> str:
    """A token in readable form: a special token's name, its text, or its bytes if not UTF-8."""
    special = info.special_tokens.get(token_id)
    if special is not None:
        return special
    spelled = info.ordinary_tokens[token_id] or b""
    try:
        return repr(spelled.decode())
    except UnicodeDecodeError:
        return repr(spelled)


def _verdict(transferred: float) -> Verdict:
    if transferred >= GOOD:
        return "good"
    return "partial" if transferred >= PARTIAL else "poor"


def _outcome(*, mapped: bool, begun: bool, share: float) -> Outcome:
    if not mapped:
        return Outcome.UNMAPPED
    if not begun:
        return Outcome.NO_START
    return Outcome.TRANSFERS if share >= _MOSTLY else Outcome.OTHER_TOKEN


def _characters(text: bytes, start: int, end: int) -> str:
    """The whole characters that a token has bytes of."""
    while start > 0 and text[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(text) and text[end] & 0xC0 == 0x80:
        end += 1
    return text[start:end].decode(errors="replace")


def _kind(characters: str) -> Kind:
    if characters.isspace():
        return "white space"
    for kind, pattern in _KINDS:
        if pattern.search(characters):
            return kind
    return "other"
