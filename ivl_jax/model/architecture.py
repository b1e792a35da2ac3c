"""A decoder's architecture as one frozen record, read from and written to a `config.json`.

In: fields, or the mapping of a Hugging Face `config.json`. Out: `ArchConfig`, whose fields affect
the numbers and are checked against each other.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ivl_jax.model import hf_config
from ivl_jax.model.rope_parameters import RopeParameters

LAYER_TYPES = ("full_attention", "sliding_attention")
HIDDEN_ACTS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class ArchConfig:
    """Everything that determines a decoder's arithmetic, under Hugging Face's field names.

    What a family hard-wires in its code is a field here too (`qk_norm`, …), so the decoder never
    checks the family.

    Raises:
        ValueError: Fields contradict each other; lists all of them.
    """

    model_type: str
    """Hugging Face's name of the family; affects only what `to_hf` writes, not the numbers."""
    vocab_size: int
    """Rows of embedding and head, V; parameters may be padded beyond it for a mesh."""
    hidden_size: int
    """Width of the residual stream, D."""
    intermediate_size: int
    """Width of the gated MLP, F."""
    num_hidden_layers: int
    """Decoder layers, L."""
    num_attention_heads: int
    """Query heads, N."""
    num_key_value_heads: int
    """Key and value heads, K; divides N."""
    head_dim: int
    """Width of one head, H; even."""
    max_position_embeddings: int
    """The longest context the model was made for, in tokens; not enforced inside the decoder."""
    rms_norm_eps: float
    """Added to the mean square inside every norm."""
    rope_parameters: RopeParameters
    """Rotary embedding of all layers, or of the full-attention ones if they differ."""
    query_pre_attn_scalar: float
    """Attention scores are divided by its square root; H in most families."""
    layer_types: tuple[str, ...]
    """Attention span of each layer: `full_attention` or `sliding_attention`."""
    sliding_window: int | None = None
    """Keys that a query of a sliding layer sees, including its own; None iff no layer slides."""
    sliding_rope_parameters: RopeParameters | None = None
    """Rotary embedding of the sliding layers; None: the same as the others."""
    hidden_act: str = "silu"
    """Activation of the MLP's gate: `silu`, `gelu` or `gelu_pytorch_tanh`."""
    tie_word_embeddings: bool = False
    """The head is the transposed embedding."""
    attention_bias: bool = False
    """Biases on the q, k and v projections."""
    attention_output_bias: bool = False
    """Bias on the o projection."""
    qk_norm: bool = False
    """RMS norm of each query and key head, before the rotary embedding."""
    joint_qk_norm: bool = False
    """The query and key norms span all heads together instead of each (OLMo-2)."""
    rotary_layers: tuple[bool, ...] = ()
    """Which layers have rotary embeddings (SmolLM3 omits some); empty: all."""
    pre_norms: bool = True
    """Norms before attention and MLP (all families but OLMo-2)."""
    post_norms: bool = False
    """Norms after attention and MLP, before the residual addition (Gemma, OLMo-2)."""
    unit_offset_norms: bool = False
    """Norms multiply by 1 + scale instead of scale (Gemma)."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by √D (Gemma)."""
    attn_logit_softcapping: float | None = None
    """Attention scores become c·tanh(score / c); None: unchanged."""
    final_logit_softcapping: float | None = None
    """Logits become c·tanh(logit / c); None: unchanged."""
    fused_projections: bool = False
    """Files store q, k and v in one tensor, gate and up in another (Phi-3); affects only files."""
    initializer_range: float = 0.02
    """Standard deviation of newly initialised kernels and embeddings."""
    base_hidden_size: int = 0
    """Width of the base hidden states that the network also reads (ours, not in published files);
    0: it reads only text."""
    head_depths: int = 1
    """Last layers whose normed outputs the head reads as a mixture (ours, `ivl_jax.model.depths`);
    1: the last one alone."""

    @property
    def plain(self) -> "ArchConfig":
        """The architecture without what only a value network has: a published model's."""
        return dataclasses.replace(self, base_hidden_size=0, head_depths=1)

    @property
    def rotates(self) -> tuple[bool, ...]:
        """Whether each layer has a rotary embedding."""
        return self.rotary_layers or (True,) * self.num_hidden_layers

    def __post_init__(self):
        sizes = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        )
        problems = [
            f"{name}: got {getattr(self, name)}, expected at least 1"
            for name in sizes
            if getattr(self, name) < 1
        ]
        if self.base_hidden_size < 0:
            problems.append(f"base_hidden_size: got {self.base_hidden_size}, expected at least 0")
        if not 1 <= self.head_depths <= max(self.num_hidden_layers, 1):
            problems.append(
                f"head_depths: got {self.head_depths}, expected 1 to the number of layers, "
                f"{self.num_hidden_layers}"
            )
        positive = ("rms_norm_eps", "query_pre_attn_scalar", "initializer_range")
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        present = [name for name in caps if getattr(self, name) is not None]
        problems += [
            f"{name}: got {getattr(self, name)}, expected a positive number"
            for name in (*positive, *present)
            if getattr(self, name) <= 0
        ]
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        width = self.rope_parameters.rotated_width(self.head_dim)
        if width < 2 or width % 2:
            problems.append(
                f"head_dim: got {self.head_dim}, of which {width} are rotated; expected a positive "
                "even number"
            )
        if self.joint_qk_norm and not self.qk_norm:
            problems.append("joint_qk_norm: needs qk_norm")
        if not self.pre_norms and not self.post_norms:
            problems.append("pre_norms, post_norms: expected at least one to be true")
        if self.hidden_act not in HIDDEN_ACTS:
            supported = ", ".join(HIDDEN_ACTS)
            problems.append(f"hidden_act: got {self.hidden_act!r}, supported: {supported}")
        _raise_if_any("ArchConfig", problems + self._span_problems())

    def _span_problems(self) -> list[str]:
        """Problems with layer types and windows."""
        problems = []
        if len(self.layer_types) != self.num_hidden_layers:
            problems.append(
                f"layer_types: {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )
        if len(self.rotary_layers) not in (0, self.num_hidden_layers):
            problems.append(
                f"rotary_layers: {len(self.rotary_layers)} entries for {self.num_hidden_layers} "
                "layers"
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            supported = ", ".join(LAYER_TYPES)
            problems.append(f"layer_types: got {', '.join(unknown)}, supported: {supported}")
        slides = "sliding_attention" in self.layer_types
        if slides != (self.sliding_window is not None):
            problems.append(
                f"sliding_window: got {self.sliding_window}, but "
                f"{'some layers are' if slides else 'no layer is'} 'sliding_attention'"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(f"sliding_window: got {self.sliding_window}, expected at least 1")
        if self.sliding_rope_parameters is not None and not slides:
            problems.append("sliding_rope_parameters: no layer is 'sliding_attention'")
        return problems

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ArchConfig":
        """Reads the mapping of a Hugging Face `config.json`, current or from older releases.

        An absent field takes the default of transformers' config class for that family.

        Args:
            config: The parsed file.

        Returns:
            The architecture; for a multimodal Gemma 3 file, that of its text model.

        Raises:
            ValueError: Fields are unknown, contradictory, or would change the outputs in a way that
                this decoder does not implement; names each with its value and what is supported.

        Source: `configuration_*.py` and `modeling_*.py` of transformers 5. Stricter: transformers
        silently keeps unknown fields.
        """
        fields = hf_config.read_fields(config)
        for name in ("rope_parameters", "sliding_rope_parameters"):
            if fields[name] is not None:
                fields[name] = RopeParameters(**fields[name])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The mapping of a `config.json` that transformers loads as the same model.

        Token ids are written as None: they belong to the tokenizer, and without them a family's
        defaults would apply.

        Returns:
            A JSON-compatible dict.

        Raises:
            ValueError: transformers' class for the family cannot express some fields.
        """
        config = hf_config.write_fields(dataclasses.asdict(self))
        again = ArchConfig.from_hf(config)
        problems = [
            f"{field.name}: {getattr(self, field.name)!r} would be read as "
            f"{getattr(again, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(again, field.name)
        ]
        _raise_if_any(f"no {self.model_type!r} model of transformers computes this", problems)
        return config


def _raise_if_any(what: str, problems: Iterable[str]) -> None:
    listed = list(problems)
    if listed:
        raise ValueError(f"{what}:\n  " + "\n  ".join(listed[:20]))
