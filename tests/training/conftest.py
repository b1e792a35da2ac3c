"""A tiny pre-trained pair in Hugging Face layout, and demonstrations for it."""

import json

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ivl_jax.config import (
    BaseConfig,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
)
from ivl_jax.model.decoder import init_params
from ivl_jax.weights.hf_saving import save_params
from tests.training.tiny import make_arch


def save_tiny_model(folder, *, seed, appended=(), **overrides):
    """A byte-level tokenizer of 258 ids, appended special tokens, and random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(appended))
    arch = make_arch(vocab_size=len(vocabulary) + len(appended), **overrides)
    params = jax.jit(lambda key: init_params(arch, key))(jax.random.key(seed))
    save_params(folder, arch, params, dtype=jnp.float32)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    """Folders `base` (untied) and `value` (tied head, one layer), and 40 demonstrations."""
    folder = tmp_path_factory.mktemp("tiny_pair")
    save_tiny_model(folder / "base", seed=0)
    save_tiny_model(folder / "value", seed=1, num_hidden_layers=1, tie_word_embeddings=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + {i % 7}?"},
                {"role": "assistant", "content": str(i + i % 7)},
            ]
        }
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_tiny_config(tiny_pair, run_dir):
    """Six steps in about a second after compilation, on one device."""
    return TrainConfig(
        run_dir=str(run_dir),
        base=BaseConfig(path=str(tiny_pair / "base")),
        value=ValueConfig(path=str(tiny_pair / "value")),
        data=DataConfig(
            train=(str(tiny_pair / "rows.jsonl"),),
            validation_fraction=0.2,
            data_dir=str(tiny_pair / "data_cache"),
            chat_template="plain",
            max_length=48,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        step=StepConfig(max_steps=6, batch_size=4, micro_batches=2),
        logging=LoggingConfig(log_every=1, evaluate_every=3, checkpoint_every=2),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )


@pytest.fixture
def tiny_config(tiny_pair, tmp_path):
    """Six steps with the tiny base."""
    return make_tiny_config(tiny_pair, tmp_path / "run")
