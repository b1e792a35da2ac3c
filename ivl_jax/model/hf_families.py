"""The supported families: a table of their defaults, and config fields that have no effect.

`hf_config` reads these constants. Defaults are those of transformers' config classes; a test
compares them with the installed release.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ivl_jax.model.rope_parameters import ROPE_KEYS


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`: the defaults of its config class, and what its code hard-wires."""

    architecture: str
    """transformers' class for causal language modelling."""
    span: str
    """How its files encode which layers slide or rotate: full, mistral, qwen, gemma2, gemma3 or
    smollm3."""
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    """None: num_attention_heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    activation_field: str = "hidden_act"
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    """None: the file's field decides, also for o_proj."""
    sliding_window: int | None = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_types: tuple[str, ...] = tuple(ROPE_KEYS)
    """The types that both its code and ours support."""
    partial_rotary: bool = False
    """Whether its code can rotate only part of each head."""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Defaults of sizes that a file may omit."""
    optional: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of `ArchConfig` that its files have, with their defaults."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `ArchConfig` that its code hard-wires, if they differ from the default."""


# Not fields of a Gemma file, but hard-wired in its code.
_GEMMA = {"post_norms": True, "unit_offset_norms": True, "scale_embeddings": True}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "full", max_position_embeddings=2048),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        max_position_embeddings=131_072,
        num_key_value_heads=8,
        attention_bias=False,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen",
        max_position_embeddings=32_768,
        num_key_value_heads=32,
        attention_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen",
        max_position_embeddings=32_768,
        num_key_value_heads=32,
        head_dim=128,
        fixed={"qk_norm": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        max_position_embeddings=8192,
        num_key_value_heads=4,
        head_dim=256,
        activation_field="hidden_activation",
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        optional={
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=_GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "gemma3",
        max_position_embeddings=131_072,
        num_key_value_heads=4,
        head_dim=256,
        activation_field="hidden_activation",
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        # The text_config of the released multimodal files omits values equal to the defaults.
        sizes={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
        # Without attn_logit_softcapping: transformers' Gemma 3 never applies it.
        optional={"query_pre_attn_scalar": 256, "final_logit_softcapping": None},
        rope_theta=1_000_000.0,
        fixed=_GEMMA | {"qk_norm": True},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "full",
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        fixed={"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True},
    ),
    "phi3": Family(  # Phi-3, Phi-3.5 and Phi-4
        "Phi3ForCausalLM",
        "mistral",
        max_position_embeddings=4096,
        attention_bias=False,
        sliding_window=None,
        rms_norm_eps=1e-5,
        rope_types=("default",),
        partial_rotary=True,
        fixed={"fused_projections": True},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        max_position_embeddings=32_768,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        sliding_window=None,
        rope_theta=2_000_000.0,
    ),
}

# Fields that never change the logits of these families. Some are defaults for `generate`, which
# older releases kept in this file.
# fmt: off
HARMLESS = frozenset({
    "architectures", "name_or_path", "_name_or_path", "transformers_version", "dtype",
    "torch_dtype", "use_cache", "pretraining_tp", "is_llama_config", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "max_sequence_length", "tokenizer_class", "prefix",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
    "finetuning_task", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
    "chunk_size_feed_forward", "cache_implementation", "max_length", "max_new_tokens",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "auto_map", "internal_version", "gradient_checkpointing", "model_max_length", "_commit_hash",
    "use_flash_attention", "use_flash_attention_2", "_flash_attn_2_enabled",
})
# Fields of a multimodal Gemma 3 file other than its text model.
MULTIMODAL = frozenset({
    "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index",
})
# Switches that must not be false: every supported model is causal and rotates.
ON = frozenset({"is_causal", "use_rope"})
# fmt: on
