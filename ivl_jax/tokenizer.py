"""Loads tokenizers and identifies them by the bytes of their tokens.

In: a Hugging Face folder. Out: the tokenizer, and a `TokenizerInfo` that identifies it.
"""

import hashlib
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
        pad_id: The padding id; where the tokenizer has none, the first of `eos_ids`, else 0. A real
            token may have the same id, so never use it to recognise padding.
        unk_id: The id of the unknown token, or None.
        ordinary_tokens: By id, the bytes of each ordinary token and None elsewhere. Empty in an
            info read from JSON; ignored when infos are compared.
    """

    vocab_size: int
    fingerprint: str
    special_tokens: Mapping[int, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    unk_id: int | None
    ordinary_tokens: tuple[bytes | None, ...] = field(default=(), repr=False, compare=False)

    @property
    def replacement_id(self) -> int:
        """What a model reads in place of a token that it never saw.

        Its unknown token, or else one that begins or ends texts.
        """
        readable = (self.unk_id, self.bos_id, *self.eos_ids, 0)
        return next(i for i in readable if i is not None)

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


def load_tokenizer(folder: epath.PathLike) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder.

    Args:
        folder: A local folder with `tokenizer.json`, or with the `vocab.json` and `merges.txt` of a
            byte-level BPE, and `tokenizer_config.json`.

    Returns:
        A tokenizer backed by the `tokenizers` library.

    Raises:
        FileNotFoundError: The folder has no tokenizer files.
        ValueError: The folder has only a SentencePiece `.model`, which transformers 5 does not
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
        tokenizer("a b")  # a malformed option may show itself only here
    except BaseException as error:  # the tokenizers library raises bare ones, and Rust's panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
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
    """Never run Python code from a model's folder, and never ask whether to."""
    path = folder / "tokenizer_config.json"
    code = read_json_object(path).get("auto_map") if path.exists() else None
    if code:
        raise ValueError(
            f"{path}: auto_map: the tokenizer is Python code in the folder ({code}), which is "
            "never run; use a model whose tokenizer.json needs no code, or, if this one needs "
            "none, remove auto_map and tokenizer_class"
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
            further ids that end a text; None to use only the tokenizer's own.

    Returns:
        The tokenizer's identity.

    Raises:
        ValueError: The bytes of the tokenizer's tokens cannot be determined.
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


def _fingerprint(ordinary: tuple[bytes | None, ...]) -> str:
    """SHA-256 over (id, length, bytes) of every ordinary token."""
    digest = hashlib.sha256()
    for token_id, spelled in enumerate(ordinary):
        if spelled is not None:
            digest.update(f"{token_id}:{len(spelled)}:".encode())
            digest.update(spelled)
    return digest.hexdigest()


def _configured_eos_ids(folder: epath.PathLike | None) -> tuple[int, ...]:
    """The ids that end a text according to `generation_config.json`, else `config.json`."""
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
    """The ids in a file's field, checked."""
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
