import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.weights.hf_names import (
    HfTensor,
    causal_name,
    file_shapes,
    hf_tensors,
    is_derived,
    is_vision,
)
from tests.weights.conftest import TINY

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi3",
    "smollm3",
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    config = AutoConfig.for_model(
        family,
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    assert file_shapes(ArchConfig.from_hf(config.to_dict())) == theirs


def test_only_kernels_are_transposed(arch: ArchConfig) -> None:
    tensors = hf_tensors(arch)
    assert tensors["layers", 1, "mlp", "up_proj", "kernel"] == HfTensor(
        "model.layers.1.mlp.up_proj.weight", transposed=True, shape=(24, 16), start=0
    )
    assert tensors["lm_head", "kernel"] == HfTensor("lm_head.weight", True, (40, 16), 0)
    assert tensors["embed_tokens", "embedding"] == HfTensor(
        "model.embed_tokens.weight", transposed=False, shape=(40, 16), start=0
    )
    assert tensors["norm", "scale"] == HfTensor("model.norm.weight", False, (16,), 0)


def test_fused_tensors_hold_several_parameters() -> None:
    arch = ArchConfig.from_hf(TINY | {"model_type": "phi3"})
    tensors = hf_tensors(arch)
    attention = "model.layers.1.self_attn.qkv_proj.weight"
    for name, shape, start in (("q", (16, 16), 0), ("k", (8, 16), 16), ("v", (8, 16), 24)):
        found = tensors["layers", 1, "self_attn", f"{name}_proj", "kernel"]
        assert found == HfTensor(attention, True, shape, start)
    up = tensors["layers", 0, "mlp", "up_proj", "kernel"]
    assert up == HfTensor("model.layers.0.mlp.gate_up_proj.weight", True, (24, 16), 24)
    shapes = file_shapes(arch)
    assert shapes[attention] == (32, 16)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (48, 16)
    assert "model.layers.1.self_attn.q_proj.weight" not in shapes


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        ("norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("normal.weight", "normal.weight"),
        ("vision_tower.encoder.layers.0.norm.weight", "vision_tower.encoder.layers.0.norm.weight"),
    ],
)
def test_prefixes_of_other_wrappers_are_removed(name: str, plain: str) -> None:
    assert causal_name(name) == plain


def test_derived_and_vision_tensors_are_recognised_and_nothing_else() -> None:
    assert is_derived("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert is_derived("model.rotary_emb.inv_freq")
    assert is_derived("model.rotary_emb_local.inv_freq")
    assert not is_derived("model.layers.11.self_attn.rotary_emb.scale")
    assert not is_derived("model.layers.11.self_attn.inv_freq")
    assert is_vision("vision_tower.post_layernorm.weight")
    assert is_vision("model.multi_modal_projector.mm_input_projection_weight")
    assert not is_vision("model.layers.0.vision_tower.weight")
