"""Published config.json files, as far as they say anything, and what each must be read as."""

import pytest

from ivl_jax.model.architecture import ArchConfig

# As the hub has them, ids and generation defaults included.
PUBLISHED = {
    "TinyLlama-1.1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.31.0.dev0",
            "use_cache": True,
            "vocab_size": 32_000,
        },
        {"head_dim": 64, "sliding_window": None, "attention_bias": False},
    ),
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151_643,
            "eos_token_id": 151_643,
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32_768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1_000_000.0,
            "sliding_window": 32_768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
        {"head_dim": 64, "sliding_window": None, "attention_bias": True},
    ),
    "Gemma-2-9B": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": 1,
            "hidden_size": 3584,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "intermediate_size": 14_336,
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "transformers_version": "4.45.2",
            "vocab_size": 256_000,
        },
        {"tie_word_embeddings": True, "sliding_window": 4096, "final_logit_softcapping": 30.0},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    config, expected = PUBLISHED[name]
    arch = ArchConfig.from_hf(config)
    assert {field: getattr(arch, field) for field in expected} == expected
    assert ArchConfig.from_hf(arch.to_hf()) == arch
