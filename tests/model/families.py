"""One tiny model of every supported family, each feature of it large enough to matter."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.architecture import ArchConfig, RopeParameters
from ivl_jax.model.decoder import Params, abstract_params
from ivl_jax.weights.hf_names import hf_tensors

VOCAB, LENGTH, WINDOW = 97, 160, 24

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 48,
}
_GEMMA = {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 5,
    "final_logit_softcapping": 3.0,
}

# Name -> config.json as transformers 5 writes it, without the fields that change nothing.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {
        **_SIZES,
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "llama3": {
        **_SIZES,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_ROPE,
    },
    "llama_bias": {
        **_SIZES,
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
    "mistral": {
        **_SIZES,
        "model_type": "mistral",
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen2": {
        **_SIZES,
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen2_window": {
        **_SIZES,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "gemma2": {
        **_SIZES,
        **_GEMMA,
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "gemma3": {
        **_SIZES,
        **_GEMMA,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
    "olmo2": {
        **_SIZES,
        "model_type": "olmo2",
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "phi3": {
        **_SIZES,
        "model_type": "phi3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "phi3_window": {
        **_SIZES,
        "model_type": "phi3",
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "smollm3": {
        **_SIZES,
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "no_rope_layers": [1, 0, 1, 0],
        "rope_parameters": _YARN_ROPE,
    },
    "yarn": {
        **_SIZES,
        "model_type": "qwen3",
        "rope_parameters": _YARN_ROPE | {"attention_factor": 1.3, "truncate": False},
    },
}
NAMES = tuple(CONFIGS)
# Each family is a compilation. These have the kinds of layer that matter to masks and caches, and
# logits and features of all families are compared with transformers' in test_hf_parity.
QUICK = ("llama_bias", "qwen2_window", "gemma2", "gemma3", "smollm3")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]

_FULL = {
    "layer_types": ("full_attention",) * 3,
    "sliding_window": None,
    "sliding_rope_parameters": None,
}
# Family -> feature -> the architecture's fields without it.
WITHOUT: dict[str, dict[str, dict[str, Any]]] = {
    "llama2": {"rope_theta": {"rope_parameters": RopeParameters(500.0)}},
    "llama3": {
        "rope scaling": {"rope_parameters": RopeParameters(500.0)},
        "tied head": {"tie_word_embeddings": False},
    },
    "llama_bias": {
        "rope scaling": {"rope_parameters": RopeParameters(100.0)},
        "qkv bias": {"attention_bias": False},
        "output bias": {"attention_output_bias": False},
    },
    "mistral": {"window": _FULL},
    "qwen2": {"qkv bias": {"attention_bias": False}},
    "qwen2_window": {"window": _FULL},
    "qwen3": {"qk norm": {"qk_norm": False}},
    "gemma2": {
        "attention soft cap": {"attn_logit_softcapping": None},
        "final soft cap": {"final_logit_softcapping": None},
        "window": _FULL,
        "extra norms": {"post_norms": False},
        "unit offset of norms": {"unit_offset_norms": False},
        "embedding scale": {"scale_embeddings": False},
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 16.0},
        "activation": {"hidden_act": "silu"},
    },
    "gemma3": {
        "final soft cap": {"final_logit_softcapping": None},
        "window": {**_FULL, "sliding_rope_parameters": None},
        "rope scaling": {"rope_parameters": RopeParameters(5000.0)},
        "local rope": {"sliding_rope_parameters": None},
        "qk norm": {"qk_norm": False},
        "extra norms": {"post_norms": False},
        "unit offset of norms": {"unit_offset_norms": False},
        "embedding scale": {"scale_embeddings": False},
        "query_pre_attn_scalar": {"query_pre_attn_scalar": 16.0},
    },
    "olmo2": {
        "norms before instead of after": {"pre_norms": True, "post_norms": False},
        "norms before as well": {"pre_norms": True},
        "qk norm": {"qk_norm": False, "joint_qk_norm": False},
    },
    "phi3": {"partial rotation": {"rope_parameters": RopeParameters(1000.0)}},
    "phi3_window": {"window": _FULL},
    "smollm3": {
        "layers without positions": {"rotary_layers": ()},
        "window": {"layer_types": ("full_attention",) * 4, "sliding_window": None},
        "rope scaling": {"rope_parameters": RopeParameters(500.0)},
    },
    "yarn": {
        "rope scaling": {"rope_parameters": RopeParameters(500.0)},
        "attention factor": {
            "rope_parameters": RopeParameters(
                500.0,
                "yarn",
                8.0,
                original_max_position_embeddings=48,
                attention_factor=1.0,
                beta_fast=4.0,
                beta_slow=0.5,
                truncate=False,
            )
        },
        "whole pairs": {
            "rope_parameters": RopeParameters(
                500.0,
                "yarn",
                8.0,
                original_max_position_embeddings=48,
                attention_factor=1.3,
                beta_fast=4.0,
                beta_slow=0.5,
                truncate=True,
            )
        },
    },
}


def tiny_arch(name: str) -> ArchConfig:
    return ArchConfig.from_hf(CONFIGS[name])


def random_params(arch: ArchConfig, *, seed: int = 0) -> Params:
    """Parameters none of which is zero, one or small: default-initialised ones hide features."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kind, module = path[-1].key, path[-2].key
        noise = rng.standard_normal(leaf.shape, np.float32)
        if kind == "scale":
            noise = 0.4 * noise + (0.2 if arch.unit_offset_norms else 1.2)
        elif kind == "kernel":
            # Queries and keys large enough for attention that is far from uniform.
            noise *= (1.5 if module in ("q_proj", "k_proj") else 1.0) / np.sqrt(leaf.shape[0])
        elif kind == "embedding":
            noise *= 0.4
        return jnp.asarray(noise)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(arch))


def params_for(arch: ArchConfig, source: Params) -> Params:
    """The parameters of `source` that `arch` has; a missing head is drawn."""
    fresh = random_params(arch, seed=1)

    def pick(path: tuple, leaf: jax.Array) -> jax.Array:
        found: Any = source
        for key in path:
            found = found.get(key.key, {})
        return leaf if isinstance(found, dict) else found

    return jax.tree_util.tree_map_with_path(pick, fresh)


def state_dict(arch: ArchConfig, params: Params) -> dict[str, np.ndarray]:
    """Hugging Face tensors by name."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path, tensor in hf_tensors(arch).items():
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)
        part = (tensor.start, np.asarray(leaf.T if tensor.transposed else leaf))
        parts.setdefault(tensor.name, []).append(part)
    # Copies: torch refuses arrays that it must not write to.
    return {
        name: np.concatenate([rows for _, rows in sorted(found, key=lambda part: part[0])])
        for name, found in parts.items()
    }


def without(arch: ArchConfig, fields: Mapping[str, Any]) -> ArchConfig:
    return dataclasses.replace(arch, **fields)


def tokens(rows: int, length: int = LENGTH, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length), dtype=np.int32)


def row_positions(mask: np.ndarray) -> np.ndarray:
    """0, 1, … along the real tokens of each row; 0 on left padding."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
