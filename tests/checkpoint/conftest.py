"""What the tests of value folders share: a small value network and its real tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivl_jax.checkpoint import ValueMetadata
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import init_params
from ivl_jax.tokenizer import describe_tokenizer

VOCAB_SIZE = 262  # 256 bytes, two specials; not a multiple of 8, so meshes must pad it


def make_tokenizer(*, extra: str = "") -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of 258 ids, and one more token where asked."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    if extra:
        vocabulary[extra] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with bos and eos."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def arch() -> ArchConfig:
    """A Llama of two layers with an untied head, 262 vocabulary rows."""
    return ArchConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )


@pytest.fixture(scope="session")
def params(arch: ArchConfig) -> dict[str, Any]:
    """Random parameters of `arch`."""
    return init_params(arch, jax.random.key(1))


@pytest.fixture(scope="session")
def metadata(arch: ArchConfig, tokenizer: PreTrainedTokenizerFast) -> ValueMetadata:
    """What a training run would say about the network."""
    return ValueMetadata(
        architecture=arch.to_hf(),
        connection="residual",
        penalty={"kind": "l1", "weight": 1.0, "positions": "real"},
        tokenizer=describe_tokenizer(tokenizer).to_json() | {"eos_ids": [257, 5], "pad_id": 257},
        training_base={"name": "some/base", "fingerprint": "abc"},
        chat_template="{{ messages }} — a template's text",
        stop_ids=(257, 5),
        steps=12,
    )


@pytest.fixture
def damage() -> Callable[[Path, str], None]:
    """Damage a file: `flip` one bit, `truncate` one byte, or `remove` it."""

    def apply(path: Path, how: str) -> None:
        content = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            path.write_bytes(content[:-1])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    return apply
