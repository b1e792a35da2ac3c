"""Pairs special tokens of two vocabularies by role.

In: the identities of two tokenizers. Out: (role, base id, value id). These tokens never occur in
running text, so counting cannot pair them; and without a paired end token, decoding never stops.
"""

import logging
from collections.abc import Collection, Sequence

from ivl_jax.tokenizer import TokenizerInfo

_LOGGER = logging.getLogger(__name__)

# End-of-turn tokens of common chat formats (ChatML, Llama 3, Gemma, Phi-3, OpenChat, Command R).
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)

SpecialPairs = tuple[tuple[str, int, int], ...]


def pair_special_tokens(
    base: TokenizerInfo,
    value: TokenizerInfo,
    *,
    base_name: str,
    value_name: str,
    by_hand: Sequence[str] = (),
) -> SpecialPairs:
    """Pair the tokens that have the same role.

    A turn end is paired with the value's token of the same name, else the value's first turn end,
    else its first end of text. An end of text is paired with the value's first end of text that is
    not a turn end; but if the base has no turn end, with the first end token of the value's
    tokenizer, since a value network trained on chats emits that one when it is done. Begin-of-text
    tokens are paired with each other, other special tokens if they have the same name.

    Args:
        base: the base's tokenizer.
        value: the value network's tokenizer.
        base_name: what to call the base in messages.
        value_name: what to call the value network in messages.
        by_hand: pairs that override the roles, each `BASE_TOKEN=VALUE_TOKEN`.

    Returns:
        (role, base id, value id), by base id; the role is `turn end`, `end`, `begin`, `same name`
        or `by hand`.

    Raises:
        ValueError: a pair by hand does not have that form, or names a token that is not special in
            its tokenizer (the message lists the special tokens).
    """
    base_turns, value_turns = _turn_ends(base), _turn_ends(value)
    value_names = {text: token_id for token_id, text in value.special_tokens.items()}
    pairs: dict[int, tuple[str, int]] = {}
    for token_id, text in base.special_tokens.items():
        if text in value_names:
            pairs[token_id] = ("same name", value_names[text])
    if base.bos_id is not None and value.bos_id is not None:
        pairs[base.bos_id] = ("begin", value.bos_id)
    text_ends = tuple(i for i in value.eos_ids if i not in value_turns) or value.eos_ids
    first_end = text_ends if base_turns else (value.eos_ids or value_turns)
    for token_id in base.eos_ids:
        if first_end:
            pairs[token_id] = ("end", first_end[0])
    for token_id in base_turns:
        named = value_names.get(base.special_tokens[token_id])
        ends = (*((named,) if named in value_turns else ()), *value_turns, *value.eos_ids)
        if ends:
            pairs[token_id] = ("turn end", ends[0])
    for text in by_hand:
        base_id, value_id = _by_hand(text, base, value, base_name=base_name, value_name=value_name)
        pairs[base_id] = ("by hand", value_id)
    _warn_of_missing_ends(pairs, base, value, value_turns, base_name, value_name)
    return tuple((role, base_id, value_id) for base_id, (role, value_id) in sorted(pairs.items()))


def base_stop_ids(pairs: SpecialPairs, value_stop_ids: Collection[int]) -> tuple[int, ...]:
    """The base's ids that stand for what ends the value network's texts.

    Args:
        pairs: of `pair_special_tokens`.
        value_stop_ids: the value network's own ids that end a text or a turn.

    Returns:
        Base ids. The token that begins a text may be the one that ends the value network's texts;
        in the base's text it ends nothing.

    Example:
        >>> base_stop_ids((("begin", 1, 9), ("end", 2, 9), ("turn end", 3, 8)), [9])
        (2,)
    """
    return tuple(
        base_id
        for role, base_id, value_id in pairs
        if value_id in value_stop_ids and role != "begin"
    )


def _turn_ends(info: TokenizerInfo) -> tuple[int, ...]:
    """Ids that end a turn; the tokenizer's own end of text comes first if it is one of them."""
    named = tuple(i for i, text in info.special_tokens.items() if text in TURN_ENDS)
    return tuple(sorted(named, key=lambda token_id: token_id not in info.eos_ids[:1]))


def _by_hand(
    pair: str, base: TokenizerInfo, value: TokenizerInfo, *, base_name: str, value_name: str
) -> tuple[int, int]:
    # A token may contain "=" itself, so every place to split is tried.
    splits = [(pair[:i], pair[i + 1 :]) for i, letter in enumerate(pair) if letter == "="]
    base_ids = {text: token_id for token_id, text in base.special_tokens.items()}
    value_ids = {text: token_id for token_id, text in value.special_tokens.items()}
    for left, right in splits:
        if left in base_ids and right in value_ids:
            return base_ids[left], value_ids[right]
    raise ValueError(
        f"the pair {pair!r} must be BASE_TOKEN=VALUE_TOKEN with a special token on each side; "
        f"{base_name} has {', '.join(list(base_ids)[:20])}; "
        f"{value_name} has {', '.join(list(value_ids)[:20])}"
    )


def _warn_of_missing_ends(
    pairs: dict[int, tuple[str, int]],
    base: TokenizerInfo,
    value: TokenizerInfo,
    value_turns: Sequence[int],
    base_name: str,
    value_name: str,
) -> None:
    """Warn of the value's end tokens that are paired with no base token."""
    paired = {value_id for _, value_id in pairs.values()}
    unpaired = [i for i in dict.fromkeys((*value.eos_ids, *value_turns)) if i not in paired]
    if not unpaired:
        return
    names = ", ".join(value.special_tokens.get(i, str(i)) for i in unpaired)
    base_end = base.special_tokens.get(base.eos_ids[0], "END") if base.eos_ids else "END"
    value_end = value.special_tokens.get(unpaired[0], str(unpaired[0]))
    _LOGGER.warning(
        "%s has the end token %s, which is paired with no token of %s; if the value network ends "
        "its turns with it, decoding would never stop: pair it by hand, --pair '%s=%s'",
        value_name,
        names,
        base_name,
        base_end,
        value_end,
    )
