import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ivl_jax.model.architecture import ArchConfig

TINY = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def arch() -> ArchConfig:
    """A tiny Llama, head and embedding apart."""
    return ArchConfig.from_hf(TINY)


@pytest.fixture
def tied_arch() -> ArchConfig:
    """The same, tied."""
    return ArchConfig.from_hf(TINY | {"tie_word_embeddings": True})


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """Random tensors of the tiny Llama under Hugging Face's names, written out by hand."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (40, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (40, 16),
    }
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards (file name → tensors) and, for more than one, their index."""

    def write(
        shards: Mapping[str, Mapping[str, np.ndarray]],
        *,
        index: Mapping[str, str] | None = None,
        name: str = "model",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file, tensors in shards.items():
            save_file(dict(tensors), folder / file, metadata={"format": "pt"})
        if index is None and len(shards) > 1:
            index = {tensor: file for file, tensors in shards.items() for tensor in tensors}
        if index is not None:
            record = {"metadata": {}, "weight_map": dict(index)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(record))
        return folder

    return write
