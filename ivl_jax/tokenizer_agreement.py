"""Checks whether the tokenizers of a base and a value network agree.

In: two `TokenizerInfo`. Out: the base's ids that the value network does not know; tokenizers that
disagree are an error. Also the comparisons behind it, for models in other roles.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ivl_jax.tokenizer import TokenizerInfo

_LOGGER = logging.getLogger(__name__)

_NAMED_AT_MOST = 20  # how many ids a message lists


class TokenizerMismatchError(ValueError):
    """Two tokenizers disagree on tokens that both have."""


@dataclass(frozen=True)
class UnknownIds:
    """How a base's tokenizer differs from a compatible value network's.

    Attributes:
        ids: Base ids that the value network does not know, ascending: their value logit is 0.
        renamed: Ids whose special tokens have different texts: id to (base's text, value's text).
    """

    ids: tuple[int, ...]
    renamed: Mapping[int, tuple[str, str]]

    def __bool__(self) -> bool:
        """Whether there is anything to warn about."""
        return bool(self.ids or self.renamed)


def check_compatible(
    base: TokenizerInfo, value: TokenizerInfo, *, base_name: str, value_name: str
) -> UnknownIds:
    """Checks that a value network's logits can be added to a base's, id by id.

    Ordinary tokens must have the same bytes wherever both have the id. Special and appended tokens
    are compared separately: a different text under the same id is a renamed token. Unknown and
    renamed tokens are logged as a warning.

    Args:
        base: The base model's tokenizer.
        value: The value network's tokenizer.
        base_name: What to call the base in messages, such as its path.
        value_name: What to call the value network in messages.

    Returns:
        The base's ids that the value network does not know, and the renamed special tokens.

    Raises:
        TokenizerMismatchError: An ordinary token differs, or the value network knows ids that the
            base does not have.

    Source: not in the paper. Llama 3, 3.1 and 3.2 rename reserved tokens, and continually
        pre-trained bases append tokens; both may carry the same value network.
    """
    problems: list[str] = []
    if base.fingerprint != value.fingerprint:
        if not base.ordinary_tokens or not value.ordinary_tokens:
            raise TokenizerMismatchError(
                f"tokenizers differ: {base_name} has fingerprint {base.fingerprint[:12]}, "
                f"{value_name} {value.fingerprint[:12]}, and the tokens of one of them are not "
                "available to compare; load both tokenizers"
            )
        problems += ordinary_differences(base, value, roles=("base", "value network"))
    base_ids, value_ids = known_ids(base), known_ids(value)
    problems += [
        f"id {token_id}: absent in the base, {_token_text(value, token_id)!r} in the value network"
        for token_id in sorted(value_ids - base_ids)
    ]
    if problems:
        raise TokenizerMismatchError(
            f"the tokenizers of the base {base_name} ({base.vocab_size} ids) and of the value "
            f"network {value_name} ({value.vocab_size} ids) differ in {len(problems)} tokens: "
            f"{listed(problems)}; build a vocabulary map between the two, or use a base from the "
            "value network's family"
        )
    renamed = warn_of_renamed(base, value, names=(base_name, value_name))
    unknown = UnknownIds(ids=tuple(sorted(base_ids - value_ids)), renamed=renamed)
    if unknown.ids:
        _LOGGER.warning(
            "%s has %d tokens that %s does not know; their value logit is 0: %s",
            base_name,
            len(unknown.ids),
            value_name,
            list_tokens(base, unknown.ids),
        )
    return unknown


def ordinary_differences(
    first: TokenizerInfo, second: TokenizerInfo, *, roles: tuple[str, str]
) -> list[str]:
    """Compares the ordinary tokens of two tokenizers where both have the id.

    Args:
        first: A tokenizer whose tokens are available.
        second: Another one.
        roles: What messages call the two models.

    Returns:
        One phrase per id that is ordinary in one tokenizer and has other bytes in the other.
    """
    differences = []
    for token_id in range(min(first.vocab_size, second.vocab_size)):
        if first.ordinary_tokens[token_id] == second.ordinary_tokens[token_id]:
            continue
        # Ordinary in one, special or absent in the other.
        ours, theirs = _bytes_of(first, token_id), _bytes_of(second, token_id)
        if ours != theirs and ours is not None and theirs is not None:
            differences.append(
                f"id {token_id}: {ours!r} in the {roles[0]}, {theirs!r} in the {roles[1]}"
            )
    return differences


def warn_of_renamed(
    first: TokenizerInfo, second: TokenizerInfo, *, names: tuple[str, str]
) -> dict[int, tuple[str, str]]:
    """Logs the special tokens whose texts differ.

    Args:
        first: A tokenizer.
        second: Another one.
        names: What the warning calls the two models.

    Returns:
        Id to both texts.
    """
    renamed = {
        token_id: (first.special_tokens[token_id], second.special_tokens[token_id])
        for token_id in sorted(first.special_tokens.keys() & second.special_tokens.keys())
        if first.special_tokens[token_id] != second.special_tokens[token_id]
    }
    if renamed:
        _LOGGER.warning(
            "%d special tokens have other names in %s than in %s: %s",
            len(renamed),
            *names,
            listed(
                f"{token_id} {ours!r}/{theirs!r}" for token_id, (ours, theirs) in renamed.items()
            ),
        )
    return renamed


def _bytes_of(info: TokenizerInfo, token_id: int) -> bytes | None:
    """The bytes of an ordinary token, of a special token's text, or None for an unused id."""
    ordinary = info.ordinary_tokens[token_id]
    if ordinary is not None:
        return ordinary
    text = info.special_tokens.get(token_id)
    return None if text is None else text.encode()


def known_ids(info: TokenizerInfo) -> set[int]:
    """Ids that have a token; every id below `vocab_size` if the tokens are not available."""
    if not info.ordinary_tokens:
        return set(range(info.vocab_size))
    ordinary = {
        token_id for token_id, spelled in enumerate(info.ordinary_tokens) if spelled is not None
    }
    return ordinary | set(info.special_tokens)


def list_tokens(info: TokenizerInfo, ids: Iterable[int]) -> str:
    """Ids and texts of some tokens, for a message."""
    return listed(f"{token_id} {_token_text(info, token_id)!r}" for token_id in ids)


def _token_text(info: TokenizerInfo, token_id: int) -> str:
    """A token as a message shows it."""
    text = info.special_tokens.get(token_id)
    if text is not None:
        return text
    spelled = info.ordinary_tokens[token_id] if info.ordinary_tokens else None
    return "?" if spelled is None else spelled.decode(errors="backslashreplace")


def listed(items: Iterable[str]) -> str:
    """The first few items, and the number of further ones."""
    found = list(items)
    more = len(found) - _NAMED_AT_MOST
    return ", ".join(found[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
