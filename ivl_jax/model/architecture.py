"""What a decoder computes, as one frozen record read from and written to Hugging Face's config.json.

In: the mapping a `config.json` holds. Out: `ArchConfig`, every field of which changes the numbers.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

RopeType = Literal["default", "linear", "llama3"]
LayerType = Literal["full_attention", "sliding_attention"]
HiddenAct = Literal["silu", "gelu", "gelu_pytorch_tanh"]


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding of one layer type; names as in Hugging Face's `rope_parameters`.

    Attributes:
        rope_theta: Base of the geometric series of wavelengths.
        rope_type: `default`, `linear` (all frequencies divided by `factor`) or `llama3` (only low ones).
        factor: Divisor of the scaled frequencies; 1 with `default`.
        low_freq_factor: `llama3` only: wavelengths above original / this are fully scaled.
        high_freq_factor: `llama3` only: wavelengths below original / this stay as they are.
        original_max_position_embeddings: `llama3` only: context length before scaling, tokens.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ArchConfig:
    """Everything that decides a decoder's arithmetic; Hugging Face's field names where it has one.

    Attributes:
        model_type: Hugging Face's family name; decides nothing here, but names the family in `to_hf`.
        vocab_size: Rows of the output the model knows, V.
        hidden_size: Width of the residual stream, D.
        intermediate_size: Width of the gated MLP, F.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads, N.
        num_key_value_heads: Key and value heads, K; divides N.
        head_dim: Width of one head, H; even.
        max_position_embeddings: Longest context the model was made for, tokens.
        rms_norm_eps: Added to the mean square inside every norm.
        rope_parameters: Rotary embedding of the layers (of the full-attention ones, where they differ).
        sliding_rope_parameters: Rotary embedding of sliding-attention layers; None: the same.
        layer_types: Attention span of each layer.
        sliding_window: Keys a sliding layer's query sees, itself included; None without such layers.
        hidden_act: Activation of the MLP's gate.
        tie_word_embeddings: The head is the transposed embedding.
        attention_bias: Biases on the q, k and v projections.
        attention_output_bias: Bias on the o projection.
        qk_norm: RMS norm over each query and key head before the rotary embedding.
        sandwich_norms: Norms after attention and MLP as well as before (Gemma).
        unit_offset_norms: Norms scale by 1 + scale instead of scale (Gemma).
        scale_embeddings: Embeddings are multiplied by sqrt(D) (Gemma).
        query_pre_attn_scalar: Attention scores are divided by its square root; H in most families.
        attn_logit_softcapping: Scores become c·tanh(score / c); None: they stay.
        final_logit_softcapping: Logits become c·tanh(logit / c); None: they stay.
        initializer_range: Standard deviation of freshly made kernels and embeddings.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    query_pre_attn_scalar: float
    layer_types: tuple[LayerType, ...]
    sliding_rope_parameters: RopeParameters | None = None
    sliding_window: int | None = None
    hidden_act: HiddenAct = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    unit_offset_norms: bool = False
    scale_embeddings: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    initializer_range: float = 0.02

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ArchConfig":
        """Reads the mapping of a Hugging Face `config.json`."""
        if config.get("model_type") != "llama":
            raise ValueError(
                f"config.json: model_type is {config.get('model_type')!r}, supported: 'llama'"
                f"{difflib.get_close_matches(str(config.get('model_type')), ['llama'])}"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        layers = config["num_hidden_layers"]
        return cls(
            model_type="llama",
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_parameters=_read_rope(config),
            query_pre_attn_scalar=float(head_dim),
            layer_types=("full_attention",) * layers,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            initializer_range=config.get("initializer_range", 0.02),
        )

    def to_hf(self) -> dict[str, Any]:
        """The mapping of a `config.json` that transformers loads as this model."""
        rope: dict[str, Any] = {
            "rope_type": self.rope_parameters.rope_type,
            "rope_theta": self.rope_parameters.rope_theta,
        }
        if self.rope_parameters.rope_type != "default":
            rope["factor"] = self.rope_parameters.factor
        if self.rope_parameters.rope_type == "llama3":
            for name in (
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ):
                rope[name] = getattr(self.rope_parameters, name)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "rope_parameters": rope,
        }


def _read_rope(config: Mapping[str, Any]) -> RopeParameters:
    """Today's `rope_parameters`, or the older `rope_theta` beside `rope_scaling`."""
    merged = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope_type = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    merged.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    return RopeParameters(rope_type=rope_type, **merged)
