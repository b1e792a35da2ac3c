"""config.json in and out: nothing that changes the outputs is lost, guessed or passed over."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

from ivl_jax.model.architecture import ArchConfig, RopeParameters
from ivl_jax.model.hf_families import FAMILIES
from ivl_jax.model.rope import rope_frequencies
from tests.model.families import CONFIGS, NAMES, tiny_arch

LLAMA = CONFIGS["llama2"]


LLAMA_31_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def hf_config(config: dict) -> dict:
    """The config.json that transformers itself would save."""
    return json.loads(transformers.AutoConfig.for_model(**config).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_alike_here_and_through_transformers(name):
    arch = tiny_arch(name)
    written = arch.to_hf()
    assert ArchConfig.from_hf(json.loads(json.dumps(written))) == arch
    assert ArchConfig.from_hf(hf_config(written)) == arch


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_are_those_of_the_installed_transformers(model_type):
    """A file that says nothing but its sizes means what transformers takes it to mean."""
    sizes = {
        "vocab_size": 100,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 30,
        "num_attention_heads": 64,
    }
    bare = {"model_type": model_type, **sizes}
    arch = ArchConfig.from_hf(bare)
    assert arch == ArchConfig.from_hf(hf_config(bare))
    theirs = transformers.AutoConfig.for_model(**bare)
    for field in ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(arch, field) == getattr(theirs, field), field


def test_gemma_3_sizes_left_out_are_those_of_its_class():
    bare = {"model_type": "gemma3_text"}
    assert ArchConfig.from_hf(bare) == ArchConfig.from_hf(hf_config(bare))


@pytest.mark.parametrize("head_dim", [None, 20])
def test_qwen2_takes_an_explicit_head_dim_as_transformers_does(head_dim):
    arch = ArchConfig.from_hf(CONFIGS["qwen2"] | {"head_dim": head_dim})
    assert arch.head_dim == (head_dim or 8)


def test_older_llama_3_files_read_like_todays():
    today = LLAMA | {"rope_parameters": LLAMA_31_SCALING | {"rope_theta": 500_000.0}}
    older = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    older |= {"rope_theta": 500_000.0, "rope_scaling": LLAMA_31_SCALING}
    arch = ArchConfig.from_hf(older)
    assert arch == ArchConfig.from_hf(today) == ArchConfig.from_hf(hf_config(older))
    assert arch.rope_parameters == RopeParameters(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def test_the_oldest_scaling_key_is_understood():
    older = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    arch = ArchConfig.from_hf(older | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert arch.rope_parameters == RopeParameters(10_000.0, "linear", 2.0)


def test_older_gemma_3_files_read_like_todays():
    older = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    }
    arch = ArchConfig.from_hf(older)
    assert arch == ArchConfig.from_hf(hf_config(older))
    assert arch.rope_parameters == RopeParameters(1_000_000.0, "linear", 8.0)
    assert arch.sliding_rope_parameters == RopeParameters(10_000.0)
    assert [kind == "full_attention" for kind in arch.layer_types] == ([False] * 5 + [True]) * 2


def test_a_multimodal_gemma_3_file_gives_its_text_model():
    """As the hub has the 12B one: the text part leaves out what equals its class."""
    multimodal = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "eos_token_id": [1, 106],
        "image_token_index": 262_144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "model_type": "gemma3_text",
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    arch = ArchConfig.from_hf(multimodal)
    assert (arch.model_type, arch.vocab_size, arch.head_dim) == ("gemma3_text", 262_208, 256)
    assert arch.tie_word_embeddings
    assert arch.layer_types.count("full_attention") == 8
    untied = ArchConfig.from_hf(multimodal | {"tie_word_embeddings": False})
    assert not untied.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama2", {"mlp_bias": True}, "mlp_bias.*got True.*supported: absent, null or false"),
        ("llama2", {"sliding_window": 4096}, "sliding_window.*4096"),
        ("llama2", {"num_experts": 8}, "num_experts: got 8"),
        ("llama2", {"num_hidden_layer": 3}, r"did you mean num_hidden_layers\?"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantised weights .unknown method."),
        ("llama2", {"attention_dropout": 0.1}, "attention_dropout: got 0.1, supported: 0"),
        ("llama2", {"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
        ("llama2", {"hidden_size": 10**400}, "hidden_size: got 1000.*…, supported: int"),
        ("llama2", {"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, .*at most"),
        ("llama2", {"layer_types": [{}, {}, {}]}, "layer_types: got"),
        ("qwen3", {"layer_types": [{}, {}, {}]}, "layer_types: got .*names"),
        (
            "phi3",
            {"rope_scaling": {"type": "su"}},
            "rope_type: got 'su', supported: default .*text's length",
        ),
        ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers: got \[1, 2\], .*0 or 1"),
        ("llama2", {"hidden_act": "relu"}, "hidden_act: got 'relu', supported: silu, gelu"),
        ("llama2", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        ("llama2", {"rope_theta": 5.0}, r"rope_theta: got 5.0, supported: the same as in"),
        ("llama2", {"hidden_size": "64"}, "hidden_size: got '64', supported: int"),
        ("llama2", {"hidden_size": None}, "hidden_size: got nothing"),
        ("llama2", {"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, supported: bool"),
        ("llama2", {"rms_norm_eps": True}, "rms_norm_eps: got True"),
        ("mistral", {"attention_bias": True}, "attention_bias: got True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window: got None"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "linear_attention, supported"),
        ("qwen3", {"is_causal": False}, "is_causal: got False, supported: true"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window_size": 7}, "sliding_window_size: got 7"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "full_attention and sliding"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named_with_what_is_supported(name, change, message):
    with pytest.raises(ValueError, match=message):
        ArchConfig.from_hf(CONFIGS[name] | change)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "longrope", "factor": 4.0},
            "rope_type: got 'longrope', supported: default, linear, .*text.s length",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": "x"}, "mscale: got 'x'"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate: got 1, .*true or false"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1}, "0 < beta_slow < beta_fast"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor: got None, supported: a number"),
        ({"rope_type": "linear"}, "factor: got None"),
        ({"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}, "attention_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor: got 2.0, supported: absent"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_31_SCALING | {"low_freq_factor": 4.0}, "0 < low_freq_factor < high_freq_factor"),
    ],
)
def test_a_rotary_embedding_that_is_not_implemented_is_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        ArchConfig.from_hf(LLAMA | {"rope_parameters": rope})


def test_all_complaints_come_at_once():
    with pytest.raises(ValueError, match=r"(?s)mlp_bias.*num_experts.*Remove a field only if"):
        ArchConfig.from_hf(LLAMA | {"mlp_bias": True, "num_experts": 4})


@pytest.mark.parametrize("family", ["qwen4", "qwen3_moe", "gpt2", None, ["llama"]])
def test_another_family_is_refused_and_the_supported_ones_are_named(family):
    with pytest.raises(ValueError, match="are not supported; supported families: llama, ") as error:
        ArchConfig.from_hf(LLAMA | {"model_type": family})
    assert repr(family) in str(error.value)
    assert "did you mean" not in str(error.value)


def test_a_quantised_model_is_refused_with_the_remedy():
    quantised = LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(
        ValueError, match=r"quantised weights \(awq\).*use the original, unquantised model"
    ):
        ArchConfig.from_hf(quantised)


def test_rope_scaling_next_to_equal_rope_parameters_is_accepted():
    scaling = {"type": "linear", "factor": 2}
    both = LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    assert ArchConfig.from_hf(both | {"rope_scaling": scaling}) == ArchConfig.from_hf(both)
    with pytest.raises(ValueError, match=r"rope_scaling: got .*the same as rope_parameters"):
        ArchConfig.from_hf(both | {"rope_scaling": scaling | {"factor": 3}})


@pytest.mark.parametrize(
    "scales",
    [{}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale": 2.0}, {"attention_factor": 0.8}],
)
def test_yarn_is_read_as_transformers_reads_it(scales):
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    older = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    older |= {"rope_scaling": {"type": "yarn", "factor": 4.0} | scales, "rope_theta": 1e6}
    older |= {"max_position_embeddings": 4096}
    arch = ArchConfig.from_hf(older)
    assert arch == ArchConfig.from_hf(hf_config(older)) == ArchConfig.from_hf(arch.to_hf())
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](transformers.AutoConfig.for_model(**older))
    assert arch.rope_parameters.attention_factor == pytest.approx(factor, rel=1e-12)
    ours = rope_frequencies(arch.rope_parameters, head_dim=arch.head_dim)
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)


def test_fields_that_change_nothing_are_passed_over():
    harmless = {
        "architectures": ["X"],
        "torch_dtype": "float16",
        "dtype": "float16",
        "use_cache": True,
        "pretraining_tp": 2,
        "eos_token_id": [1, 2],
        "mlp_bias": False,
        "rope_scaling": None,
        "quantization_config": None,
        "temperature": 0.6,
        "is_causal": True,
        "transformers.js_config": {"kv_cache_dtype": "fp16"},
        "internal_version": "1.0",
        "gradient_checkpointing": True,
        "model_max_length": 2048,
        "hidden_dropout": 0.0,
        "resid_pdrop": 0,
        "attention_dropout": 0,
        "auto_map": {"AutoConfig": "configuration_x.XConfig"},
    }
    assert ArchConfig.from_hf(LLAMA | harmless) == ArchConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads, 4"),
        ({"head_dim": 7}, "head_dim: got 7"),
        ({"pre_norms": False}, "pre_norms, post_norms: expected at least one"),
        ({"joint_qk_norm": True}, "needs qk_norm"),
        ({"rotary_layers": (True,)}, "1 entries for 3 layers"),
        ({"layer_types": ("full_attention",)}, "1 entries for 3 layers"),
        ({"sliding_window": 5}, "no layer is 'sliding_attention'"),
        ({"sliding_rope_parameters": RopeParameters(1.0)}, "sliding_rope_parameters"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping: got 0.0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_arch("llama2"), **change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama2", {"qk_norm": True}),
        ("llama2", {"fused_projections": True}),
        ("llama2", {"rotary_layers": (True, False, True)}),
        ("olmo2", {"pre_norms": True}),
        ("llama2", {"attention_output_bias": True}),
        ("mistral", {"query_pre_attn_scalar": 3.0}),
        ("gemma2", {"query_pre_attn_scalar": 3.5}),
        ("qwen2", {"attention_bias": False}),
        ("gemma3", {"attn_logit_softcapping": 4.0}),
    ],
)
def test_what_a_family_cannot_express_is_not_written(name, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(tiny_arch(name), **change).to_hf()


def test_a_gemma_without_sliding_layers_can_be_written():
    arch = dataclasses.replace(
        tiny_arch("gemma3"),
        layer_types=("full_attention",) * 3,
        sliding_window=None,
        sliding_rope_parameters=None,
    )
    assert ArchConfig.from_hf(hf_config(arch.to_hf())) == arch
