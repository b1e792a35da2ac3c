"""Derives the bytes that each token stands for from the tokenizer's own decoder.

In: a tokenizer with a fast backend. Out: by id, the bytes of its ordinary tokens, and separately
the text of its special and appended tokens.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

# Decoder steps that do not change what a single token spells.
_NEUTRAL_DECODERS = frozenset({"Fuse", "Strip"})
_MOST_IDS = 1 << 24  # 64 times the largest published vocabularies; a table of 2**31 takes 17 GB


def ordinary_token_bytes(tokenizer: Any) -> tuple[bytes | None, ...]:
    """Returns, by id, the bytes of ordinary tokens; None for special, appended and unused ids.

    Args:
        tokenizer: What `load_tokenizer` returned. Byte-level BPE (the GPT-2 alphabet) and
            SentencePiece style (a word mark for the space, `<0x0A>` for single bytes) both give
            the bytes they decode to in the middle of a text.

    Raises:
        ValueError: The bytes of the tokenizer's tokens cannot be determined.
    """
    return split_vocabulary(tokenizer)[0]


def split_vocabulary(tokenizer: Any) -> tuple[tuple[bytes | None, ...], dict[int, str]]:
    """Separates a vocabulary into ordinary tokens and special or appended ones.

    Args:
        tokenizer: A transformers tokenizer with a fast backend.

    Returns:
        By id, each ordinary token's bytes (None elsewhere); and id to text for special and appended
        tokens.

    Raises:
        ValueError: The bytes of the tokenizer's tokens cannot be determined, or an id is beyond any
            vocabulary.
    """
    backend = tokenizer.backend_tokenizer
    model_vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    model_ids = set(model_vocabulary.values())
    # An added token that is also in the model's vocabulary (Gemma's "\n\n") is ordinary.
    special = {
        token_id: token.content
        for token_id, token in sorted(added.items())
        if token.special or token_id not in model_ids
    }
    largest = max(model_ids | set(special), default=-1)
    if largest >= _MOST_IDS:
        raise ValueError(
            f"{tokenizer.name_or_path}/tokenizer.json: expected token ids below {_MOST_IDS}, got "
            f"{largest}; download the file again"
        )
    ordinary: list[bytes | None] = [None] * (largest + 1)
    spell = _speller(backend)
    for text, token_id in model_vocabulary.items():
        if token_id not in special:
            ordinary[token_id] = spell(text)
    return tuple(ordinary), special


def _speller(backend: Any) -> Callable[[str], bytes]:
    """Returns the function from a token's text to its bytes, derived from the decoder."""
    steps = _flatten(backend.decoder, "decoders")
    kinds = {step["type"] for step in steps}
    if not steps and any(
        step["type"] == "ByteLevel" for step in _flatten(backend.pre_tokenizer, "pretokenizers")
    ):
        kinds = {"ByteLevel"}
    unknown = kinds - _NEUTRAL_DECODERS - {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}
    if unknown:
        raise ValueError(
            f"tokenizer decoder: expected ByteLevel, Metaspace, Replace or ByteFallback, got "
            f"{sorted(unknown)}; the bytes of such tokens are not known, so tokenizers of this "
            "kind cannot be compared"
        )
    replacements: list[tuple[str, str]] = []
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise ValueError(
                    f"tokenizer decoder: Replace with a regular expression is not supported: {step}"
                )
            replacements.append((step["pattern"]["String"], step["content"]))

    def spell(text: str) -> bytes:
        if (
            "ByteFallback" in kinds
            and len(text) == 6
            and text.startswith("<0x")
            and text.endswith(">")
        ):
            return bytes([int(text[3:5], 16)])
        for pattern, content in replacements:
            text = text.replace(pattern, content)
        if "ByteLevel" in kinds:
            alphabet = _byte_alphabet()
            if all(character in alphabet for character in text):
                return bytes(alphabet[character] for character in text)
        return text.encode()

    return spell


def _flatten(part: Any, children: str) -> list[dict[str, Any]]:
    """The steps of one component of a tokenizer, with nested sequences flattened."""
    if part is None:
        return []

    def opened(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step["type"] == "Sequence":
            return [inner for child in step[children] for inner in opened(child)]
        return [step]

    return opened(json.loads(part.__getstate__()))


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters to bytes: printable bytes as themselves, others from U+0100 on.

    Source: `bytes_to_unicode` in openai/gpt-2, encoder.py.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return alphabet
