"""Toy tokenizers of both kinds, made here: no file of a third party is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat. The cats sat on the mats!",
    "12 + 3 = 15, and 120 - 15 = 105\nso the answer is 105.",
    "naïve café, 水と火, 🙂 and 🙃: bytes that split a character",
    "def add(a, b):\n    return a + b  # the sum of a and b",
]

ToyTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def toy_corpus() -> list[str]:
    """Texts with numbers, code, and characters of two to four bytes."""
    return CORPUS


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> ToyTokenizer:
    """Makes a byte-level BPE tokenizer (GPT-2's kind) of a given size."""

    def make(
        size: int = 320, *, eos: str = "<|endoftext|>", also: tuple[str, ...] = ()
    ) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[eos, *also],
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=eos)

    return make


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> ToyTokenizer:
    """Makes a SentencePiece-like tokenizer (Llama's kind): ▁ for spaces, bytes as fallback."""

    def make(size: int = 340, *, also: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
        special = ["<unk>", "<s>", "</s>", *also]
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        plain = Tokenizer(models.BPE())
        prepare = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        plain.normalizer = prepare
        trainer = trainers.BpeTrainer(
            vocab_size=size - 256, special_tokens=special, show_progress=False, limit_alphabet=50
        )
        ascii_only = ["".join(c for c in text if c.isascii() and c != "\n") for text in CORPUS]
        plain.train_from_iterator(ascii_only, trainer)
        learned = plain.get_vocab()
        pieces = [p for p in sorted(learned, key=learned.__getitem__) if p not in special]
        merges = [tuple(pair) for pair in _merges(plain)]
        vocab = {piece: i for i, piece in enumerate([*special, *fallback, *pieces])}
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = prepare
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        tokenizer.add_special_tokens(special)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )

    return make


@pytest.fixture(scope="session")
def save_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Path]:
    """Writes a tokenizer into a folder of a given name."""

    def save(tokenizer: Any, name: str) -> Path:
        folder = tmp_path_factory.mktemp("tokenizers") / name
        tokenizer.save_pretrained(str(folder))
        return folder

    return save


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]
