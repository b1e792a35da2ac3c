"""Small tokenizers and demonstrations for the data tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivl_jax.data.demonstrations import Demonstration, Message


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token a byte, and the special tokens of ChatML; padding is the end of sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_special_tokens({"pad_token": "<eos>"})
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    return tokenizer


@pytest.fixture(scope="session")
def shared_tokenizer(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Loads one of the three shared tokenizers by name, once."""
    from ivl_jax.tokenizer import load_tokenizer

    folders = {
        "stories260k": "stories260k_dir",
        "llama2": "llama2_tokenizer_dir",
        "gpt2": "gpt2_tokenizer_dir",
    }
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        folder: Path = request.getfixturevalue(folders[name])
        if name not in loaded:
            loaded[name] = load_tokenizer(folder)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def arithmetic() -> list[Demonstration]:
    """Thirty dialogues of one or two assistant turns, none like another."""
    demonstrations = []
    for number in range(30):
        messages = [
            Message("user", f"{number} + {number}?"),
            Message("assistant", "I" * (number % 7) + f" say {2 * number}."),
        ]
        if number % 3 == 0:
            messages += [Message("user", "Sure?"), Message("assistant", "Yes.")]
        demonstrations.append(Demonstration(tuple(messages), f"sums.jsonl:{number + 1}"))
    return demonstrations
