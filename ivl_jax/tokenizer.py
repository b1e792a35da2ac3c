"""Loads tokenizers, identifies them by the bytes of their tokens, and says whether two agree.

In: a Hugging Face folder. Out: the tokenizer, a `TokenizerInfo` that identifies it, and the ids
that a value network does not know when it is put on another base.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from etils import epath

from ivl_jax.json_files import read_json_object
from ivl_jax.token_bytes import split_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = (
        Any  # importing transformers costs about a second: only where it is used
    )

_LOGGER = logging.getLogger(__name__)

_NAMED_AT_MOST = 20  # how many ids a message lists


class TokenizerMismatchError(ValueError):
    """Two tokenizers disagree on tokens both of them have."""


@dataclass(frozen=True)
class TokenizerInfo:
    """What identifies a tokenizer.

    Attributes:
        vocab_size: The number of real ids: the largest id plus one.
        fingerprint: SHA-256 over the ordinary tokens, id by id, as bytes.
        special_tokens: Id to text of special and appended tokens; not in the fingerprint.
        bos_id: The begin-of-sequence id, or None where the tokenizer has none.
        eos_ids: Every id that ends a text, the tokenizer's own first, then those of
            `generation_config.json` (or `config.json` where that is absent).
        pad_id: The padding id; the first of `eos_ids`, else 0, where the tokenizer names none.
            Nothing may be concluded from a token being equal to it.
        unk_id: The id of the unknown token, or None.
        ordinary_tokens: By id, the bytes of each ordinary token and None elsewhere. Empty in an
            info read from JSON; it takes no part in comparisons between infos.
    """

    vocab_size: int
    fingerprint: str
    special_tokens: Mapping[int, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    unk_id: int | None
    ordinary_tokens: tuple[bytes | None, ...] = field(default=(), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Returns everything but `ordinary_tokens`, ready for `json.dumps`."""
        return {
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "special_tokens": {
                str(token_id): text for token_id, text in self.special_tokens.items()
            },
            "bos_id": self.bos_id,
            "eos_ids": list(self.eos_ids),
            "pad_id": self.pad_id,
            "unk_id": self.unk_id,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "TokenizerInfo":
        """Reads what `to_json` wrote; the info equals the one it came from.

        Raises:
            ValueError: A key is missing or unknown.
        """
        expected = {
            "vocab_size",
            "fingerprint",
            "special_tokens",
            "bos_id",
            "eos_ids",
            "pad_id",
            "unk_id",
        }
        if set(record) != expected:
            raise ValueError(
                f"tokenizer info: expected the keys {sorted(expected)}, got {sorted(record)}; "
                "the file was written by another version of ivl_jax or altered"
            )
        return cls(
            vocab_size=record["vocab_size"],
            fingerprint=record["fingerprint"],
            special_tokens={
                int(token_id): text for token_id, text in record["special_tokens"].items()
            },
            bos_id=record["bos_id"],
            eos_ids=tuple(record["eos_ids"]),
            pad_id=record["pad_id"],
            unk_id=record["unk_id"],
        )


@dataclass(frozen=True)
class UnknownIds:
    """How a base's tokenizer goes beyond the value network's where they are compatible.

    Attributes:
        ids: Base ids that the value network does not know, ascending: their value logit is 0.
        renamed: Ids whose special token has another text: id to (base's text, value's text).
    """

    ids: tuple[int, ...]
    renamed: Mapping[int, tuple[str, str]]

    def __bool__(self) -> bool:
        """Whether there is anything to warn of."""
        return bool(self.ids or self.renamed)


def load_tokenizer(folder: epath.PathLike) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder.

    Args:
        folder: A local folder with `tokenizer.json`, or with the `vocab.json` and `merges.txt` of a
            byte-level BPE, and `tokenizer_config.json`.

    Returns:
        A tokenizer backed by the `tokenizers` library.

    Raises:
        FileNotFoundError: The folder holds no tokenizer files.
        ValueError: The folder holds only a SentencePiece `.model`, which transformers 5 does not
            convert faithfully, or a tokenizer without the fast backend.
    """
    folder = epath.Path(folder)
    has_fast_files = (folder / "tokenizer.json").exists() or (
        (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    )
    if not has_fast_files:
        if folder.exists() and any(folder.glob("*.model")):
            raise ValueError(
                f"{folder} has a SentencePiece model but no tokenizer.json; transformers 5 turns "
                "such a file into a tokenizer that splits text differently; add the tokenizer.json "
                "published with the model"
            )
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else "no folder"
        raise FileNotFoundError(
            f"{folder}: expected tokenizer.json (or vocab.json and merges.txt), found {found}"
        )
    from transformers import AutoTokenizer

    _refuse_own_code(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare ones
        raise ValueError(
            f"{folder}: its tokenizer files cannot be read ({type(error).__name__}: {error}); "
            "download tokenizer.json and tokenizer_config.json again"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{folder}: {type(tokenizer).__name__} has no fast backend, and exact loss masks need "
            "its character offsets; provide a tokenizer.json"
        )
    return tokenizer


def _refuse_own_code(folder: epath.Path) -> None:
    """Code of a folder is never run, and nobody is asked whether it may be."""
    path = folder / "tokenizer_config.json"
    code = read_json_object(path).get("auto_map") if path.exists() else None
    if code:
        raise ValueError(
            f"{path}: auto_map: the tokenizer is Python code of the folder ({code}), which is "
            "never run; use a model whose tokenizer.json stands alone, or, where it does here, "
            "remove auto_map and tokenizer_class"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: epath.PathLike) -> None:
    """Writes the tokenizer's files, chat template included.

    Args:
        tokenizer: What `load_tokenizer` returned.
        folder: A local folder, created if absent; `load_tokenizer(folder)` gives a tokenizer with
            the same info.
    """
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: epath.PathLike | None = None
) -> TokenizerInfo:
    """Identifies a tokenizer by its tokens' bytes and its special tokens' roles.

    Args:
        tokenizer: What `load_tokenizer` returned.
        folder: The model's folder, whose `generation_config.json` (else `config.json`) may list
            further ids that end a text; None when only the tokenizer's own counts.

    Returns:
        The tokenizer's identity.

    Raises:
        ValueError: The tokenizer spells its tokens in a way whose bytes are not known.
    """
    ordinary, special = split_vocabulary(tokenizer)
    role_ids: dict[str, Any] = {
        role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")
    }
    eos_ids = _unique(_as_ids(role_ids["eos"]), _configured_eos_ids(folder))
    pad_id = role_ids["pad"]
    if pad_id is None:
        pad_id = eos_ids[0] if eos_ids else 0
    return TokenizerInfo(
        vocab_size=len(ordinary),
        fingerprint=_fingerprint(ordinary),
        special_tokens=special,
        bos_id=role_ids["bos"],
        eos_ids=eos_ids,
        pad_id=pad_id,
        unk_id=role_ids["unk"],
        ordinary_tokens=ordinary,
    )


def check_compatible(
    base: TokenizerInfo, value: TokenizerInfo, *, base_name: str, value_name: str
) -> UnknownIds:
    """Says whether a value network's logits may be added to a base's, id by id.

    Ordinary tokens must be the same bytes wherever both have the id. Special and appended tokens
    are compared apart: another text under the same id is a renamed token. What is unknown or
    renamed is logged as a warning.

    Args:
        base: The base model's tokenizer.
        value: The value network's tokenizer.
        base_name: What to call the base in messages, say its path.
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
                f"{value_name} {value.fingerprint[:12]}, and the tokens of one are not at hand to "
                "compare; load both tokenizers"
            )
        problems += _ordinary_differences(base, value)
    base_ids, value_ids = _known_ids(base), _known_ids(value)
    problems += [
        f"id {token_id}: absent in the base, {_token_text(value, token_id)!r} in the value network"
        for token_id in sorted(value_ids - base_ids)
    ]
    if problems:
        raise TokenizerMismatchError(
            f"the tokenizers of the base {base_name} ({base.vocab_size} ids) and of the value "
            f"network {value_name} ({value.vocab_size} ids) differ in {len(problems)} tokens: "
            f"{_listed(problems)}; build a vocabulary map between the two, or use a base of the "
            "value network's family"
        )
    renamed = {
        token_id: (base.special_tokens[token_id], value.special_tokens[token_id])
        for token_id in sorted(base.special_tokens.keys() & value.special_tokens.keys())
        if base.special_tokens[token_id] != value.special_tokens[token_id]
    }
    unknown = UnknownIds(ids=tuple(sorted(base_ids - value_ids)), renamed=renamed)
    if unknown.ids:
        _LOGGER.warning(
            "%s has %d tokens that %s does not know; their value logit is 0: %s",
            base_name,
            len(unknown.ids),
            value_name,
            _listed(f"{token_id} {_token_text(base, token_id)!r}" for token_id in unknown.ids),
        )
    if unknown.renamed:
        _LOGGER.warning(
            "%d special tokens have other names in %s than in %s: %s",
            len(renamed),
            base_name,
            value_name,
            _listed(
                f"{token_id} {ours!r}/{theirs!r}" for token_id, (ours, theirs) in renamed.items()
            ),
        )
    return unknown


def _ordinary_differences(base: TokenizerInfo, value: TokenizerInfo) -> list[str]:
    """A phrase for each id that is ordinary on one side and spelled otherwise on the other."""
    differences = []
    for token_id in range(min(base.vocab_size, value.vocab_size)):
        base_bytes, value_bytes = base.ordinary_tokens[token_id], value.ordinary_tokens[token_id]
        if base_bytes == value_bytes:
            continue
        # Ordinary on one side, special or absent on the other.
        base_bytes = _bytes_of(base, token_id)
        value_bytes = _bytes_of(value, token_id)
        if base_bytes != value_bytes and base_bytes is not None and value_bytes is not None:
            differences.append(
                f"id {token_id}: {base_bytes!r} in the base, {value_bytes!r} in the value network"
            )
    return differences


def _bytes_of(info: TokenizerInfo, token_id: int) -> bytes | None:
    """The bytes of an ordinary token, the text's bytes of a special one, None of a hole."""
    ordinary = info.ordinary_tokens[token_id]
    if ordinary is not None:
        return ordinary
    text = info.special_tokens.get(token_id)
    return None if text is None else text.encode()


def _known_ids(info: TokenizerInfo) -> set[int]:
    """Ids that stand for a token; every id below `vocab_size` when the table is not at hand."""
    if not info.ordinary_tokens:
        return set(range(info.vocab_size))
    ordinary = {
        token_id for token_id, spelled in enumerate(info.ordinary_tokens) if spelled is not None
    }
    return ordinary | set(info.special_tokens)


def _token_text(info: TokenizerInfo, token_id: int) -> str:
    """A token as a message shows it."""
    text = info.special_tokens.get(token_id)
    if text is not None:
        return text
    spelled = info.ordinary_tokens[token_id] if info.ordinary_tokens else None
    return "?" if spelled is None else spelled.decode(errors="backslashreplace")


def _listed(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    listed = list(items)
    more = len(listed) - _NAMED_AT_MOST
    return ", ".join(listed[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _fingerprint(ordinary: tuple[bytes | None, ...]) -> str:
    """SHA-256 over (id, length, bytes) of every ordinary token."""
    digest = hashlib.sha256()
    for token_id, spelled in enumerate(ordinary):
        if spelled is not None:
            digest.update(f"{token_id}:{len(spelled)}:".encode())
            digest.update(spelled)
    return digest.hexdigest()


def _configured_eos_ids(folder: epath.PathLike | None) -> tuple[int, ...]:
    """The ids that end a text by `generation_config.json`, else by `config.json`."""
    if folder is None:
        return ()
    for name in ("generation_config.json", "config.json"):
        path = epath.Path(folder) / name
        if path.exists():
            record = read_json_object(path)
            text = record.get("text_config")
            inner = text.get("eos_token_id") if isinstance(text, dict) else None
            return _checked_ids(record.get("eos_token_id", inner), path)
    return ()


def _checked_ids(value: Any, path: epath.Path) -> tuple[int, ...]:
    """Ids as a file has them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError(f"{path}: eos_token_id: expected token ids, got {str(value)[:60]}")
    return tuple(ids)


def _as_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """No id, one or several, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _unique(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """The ids in order of first appearance."""
    return tuple(dict.fromkeys(token_id for group in groups for token_id in group))
