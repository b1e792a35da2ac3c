"""What the decoder promises beyond its logits: who sees whom, forms of execution, shapes, heads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import (
    Params,
    abstract_params,
    build_decoder,
    embed,
    embed_probabilities,
    forward,
    hidden_states,
    init_params,
    logits_from_hidden,
    stack_layers,
    unstack_layers,
    untie_head,
    zero_head,
)
from ivl_jax.model.remat import Remat
from tests.model.families import (
    CONFIGS,
    FAMILIES,
    VOCAB,
    WINDOW,
    random_params,
    tiny_arch,
    tokens,
    without,
)

LENGTH = 40
# Layers that differ; between them tied and untied heads, biases, qk norms, soft caps.
MIXED = (
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_window", "gemma2")),
)


def ids(rows: int = 2, length: int = LENGTH) -> jax.Array:
    return jnp.asarray(tokens(rows, length))


def positions(rows: int = 2, length: int = LENGTH) -> jax.Array:
    return jnp.tile(jnp.arange(length, dtype=jnp.int32)[None], (rows, 1))


def run(arch, params, x, *, segment_ids=None, **options) -> jax.Array:
    graphdef = build_decoder(arch, **options)
    at = positions(*x.shape)
    return forward(graphdef, params, x, positions=at, segment_ids=segment_ids)


@functools.cache
def sensitivity(arch: ArchConfig, *, target: int) -> tuple[np.ndarray, Params]:
    """Largest |∂ logits[target] / ∂ embedding[s]| of every position s, and ∂ / ∂ parameters."""
    graphdef = build_decoder(arch)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def probe(shift: jax.Array, params: Params) -> jax.Array:
        embeddings = embed(graphdef, params, ids(1)) + shift
        hidden, _ = hidden_states(
            graphdef, params, None, positions=positions(1), input_embeddings=embeddings
        )
        logits = logits_from_hidden(graphdef, params, hidden)[0, target]
        return jnp.sum(logits * jnp.arange(VOCAB, dtype=jnp.float32))

    by_token, by_parameter = probe(jnp.zeros((1, LENGTH, arch.hidden_size)), random_params(arch))
    return np.abs(np.asarray(by_token))[0].max(axis=-1), by_parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_no_later_token_has_any_influence(name):
    influence, _ = sensitivity(tiny_arch(name), target=25)
    assert np.all(influence[26:] == 0.0)
    assert np.all(influence[20:26] > 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_moves_the_logits(name):
    _, gradient = sensitivity(tiny_arch(name), target=25)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_sliding_layer_sees_exactly_its_window(name):
    one_layer = {"num_hidden_layers": 1, "layer_types": ("sliding_attention",)}
    influence, _ = sensitivity(without(tiny_arch(name), one_layer), target=35)
    assert np.all(influence[: 36 - WINDOW] == 0.0)
    assert np.all(influence[36 - WINDOW : 36] > 0.0)


# YaRN stretches queries and keys, and their rounding with them: 2.8e-5 seen.
_ROUNDING = {"yarn": 4e-5}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_segments_equal_the_sequences_alone(name):
    arch = tiny_arch(name)
    params, graphdef = random_params(arch), build_decoder(arch)
    lengths = (7, 26, 5)
    packed, at, start = ids(1), np.zeros((1, LENGTH), np.int32), 0
    segments = np.zeros((1, LENGTH), np.int32)  # The last two tokens are padding.
    for number, length in enumerate(lengths, 1):
        at[0, start : start + length] = np.arange(length)
        segments[0, start : start + length] = number
        start += length
    together = forward(
        graphdef, params, packed, positions=jnp.asarray(at), segment_ids=jnp.asarray(segments)
    )
    start = 0
    for length in lengths:
        alone = run(arch, params, packed[:, start : start + length])
        np.testing.assert_allclose(
            together[:, start : start + length], alone, rtol=1e-5, atol=_ROUNDING.get(name, 2e-5)
        )
        start += length
    assert np.all(np.isfinite(together))


def value_and_gradient(arch, params, **options):
    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = run(arch, params, ids(), **options)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    return loss(params)


@functools.cache
def plain_value_and_gradient(name: str):
    return value_and_gradient(tiny_arch(name), random_params(tiny_arch(name)))


def assert_trees_close(got, expected, *, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_scanned_layers_equal_unstacked_ones_in_value_and_gradient(name):
    arch = tiny_arch(name)
    value, gradient = plain_value_and_gradient(name)
    params = stack_layers(random_params(arch))
    scanned_value, scanned = value_and_gradient(arch, params, scan_layers=True)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-6)
    assert_trees_close(unstack_layers(scanned), gradient)


@pytest.mark.parametrize(
    ("name", "scan_layers", "remat"),
    [("qwen3", False, "full"), ("qwen3", False, "dots"), ("gemma3", True, "full")],
)
def test_rematerialised_layers_equal_kept_ones(name, scan_layers, remat):
    arch = tiny_arch(name)
    value, gradient = plain_value_and_gradient(name)
    params = stack_layers(random_params(arch)) if scan_layers else random_params(arch)
    again, recomputed = value_and_gradient(arch, params, scan_layers=scan_layers, remat=remat)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert_trees_close(unstack_layers(recomputed) if scan_layers else recomputed, gradient)


def test_remat_keeps_only_one_layers_activations_at_a_time():
    arch = without(
        tiny_arch("llama3"), {"num_hidden_layers": 8, "layer_types": ("full_attention",) * 8}
    )
    params = stack_layers(random_params(arch))

    def temporary_bytes(remat: Remat) -> int:
        def loss(params):
            return jnp.mean(run(arch, params, ids(4), remat=remat, scan_layers=True))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full, dots, none = (temporary_bytes(remat) for remat in ("full", "dots", "none"))
    assert full < 0.3 * none
    assert full < dots < 0.7 * none


def test_stacking_and_unstacking_are_inverse():
    params = random_params(tiny_arch("gemma3"))
    again = unstack_layers(stack_layers(params))
    assert list(again["layers"]) == [0, 1, 2]
    assert_trees_close(again, params, atol=0)


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_bf16_compute_gives_fp32_logits_near_the_fp32_ones(name):
    arch = tiny_arch(name)
    params = random_params(arch)
    exact = run(arch, params, ids())
    rough = run(arch, params, ids(), compute_dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert len(np.unique(np.asarray(rough).view(np.uint32) & 0xFFFF)) > 100  # Not rounded to bf16.
    assert 1e-4 < np.abs(rough - exact).mean() < 0.1 * np.abs(exact).mean()


def test_parameters_stored_in_bf16_are_cast_at_use():
    arch = tiny_arch("gemma3")
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(arch))
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    np.testing.assert_array_equal(run(arch, stored, ids()), run(arch, widened, ids()))


def test_a_token_outside_the_vocabulary_gives_nan_not_another_tokens_logits():
    arch = tiny_arch("llama2")
    logits = run(arch, random_params(arch), jnp.asarray([[3, VOCAB, 5], [3, 4, 5]], jnp.int32))
    assert np.all(np.isnan(logits[0, 1:]))
    assert np.all(np.isfinite(logits[1]))


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_untying_the_head_keeps_the_logits(name):
    arch = tiny_arch(name)
    params = random_params(arch)
    untied = untie_head(params)
    assert "lm_head" not in params
    assert untied["lm_head"]["kernel"].shape == (arch.hidden_size, VOCAB)
    expected = run(arch, params, ids())
    np.testing.assert_allclose(run(arch, untied, ids()), expected, atol=1e-5)
    untied_arch = dataclasses.replace(arch, tie_word_embeddings=False)
    np.testing.assert_allclose(run(untied_arch, untied, ids()), expected, atol=1e-5)


def test_a_head_that_params_carry_is_used_though_the_architecture_is_tied():
    arch = tiny_arch("llama3")
    params = untie_head(random_params(arch))
    doubled = params | {"lm_head": {"kernel": 2.0 * params["lm_head"]["kernel"]}}
    expected = 2.0 * run(arch, params, ids())
    np.testing.assert_allclose(run(arch, doubled, ids()), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_zeroed_head_gives_zero_logits_and_its_own_gradient(name):
    arch = without(tiny_arch(name), {"tie_word_embeddings": False})
    params = zero_head(random_params(tiny_arch(name)))
    assert np.all(np.asarray(run(arch, params, ids())) == 0.0)
    _, gradient = value_and_gradient(arch, params)
    assert np.abs(gradient["lm_head"]["kernel"]).max() > 0
    assert np.all(np.asarray(gradient["embed_tokens"]["embedding"]) == 0.0)


def test_a_one_hot_distribution_embeds_like_its_token():
    arch = tiny_arch("gemma2")
    params, graphdef = random_params(arch), build_decoder(arch)
    expected = embed(graphdef, params, ids())
    got = embed_probabilities(graphdef, params, jax.nn.one_hot(ids(), VOCAB, dtype=jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_every_activation_is_offered_to_constrain_with_a_name_for_each_axis():
    arch = tiny_arch("qwen2")
    seen = []

    def constrain(x, axes):
        assert x.ndim == len(axes)
        seen.append(axes)
        return x

    hidden_states(
        build_decoder(arch), random_params(arch), ids(), positions=positions(), constrain=constrain
    )
    assert set(seen) == {
        ("batch", "length", "embed"),
        ("batch", "length", "heads", "head_dim"),
        ("batch", "length", "mlp"),
    }


def test_fresh_parameters_have_the_abstract_shapes_and_the_initial_spread():
    arch = tiny_arch("gemma3")
    make = functools.partial(init_params, arch, param_dtype=jnp.bfloat16, vocab_rows=104)
    params = jax.jit(make)(jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert shapes == abstract_params(arch, param_dtype=jnp.bfloat16, vocab_rows=104)
    assert params["embed_tokens"]["embedding"].shape == (104, 32)
    assert np.std(params["embed_tokens"]["embedding"].astype(jnp.float32)) == pytest.approx(
        arch.initializer_range, rel=0.05
    )
    assert np.all(np.asarray(params["norm"]["scale"]) == 0)  # 1 + scale
    assert np.all(np.asarray(init_params(tiny_arch("qwen2"), jax.random.key(0))["norm"]["scale"]))


def test_equal_keys_give_equal_parameters_stacked_or_not():
    arch = tiny_arch("qwen2")
    plain = init_params(arch, jax.random.key(7))
    stacked = init_params(arch, jax.random.key(7), scan_layers=True)
    assert_trees_close(unstack_layers(stacked), plain, atol=0)
    other = init_params(arch, jax.random.key(8))["embed_tokens"]["embedding"]
    assert not np.array_equal(other, plain["embed_tokens"]["embedding"])


def test_the_graphdef_is_static_and_made_once():
    arch = tiny_arch("gemma2")
    again = ArchConfig.from_hf(CONFIGS["gemma2"])
    assert build_decoder(arch) is build_decoder(again)
    assert hash(build_decoder(arch)) != hash(build_decoder(arch, scan_layers=True))


def test_misplaced_parameters_are_named():
    arch = tiny_arch("llama2")
    params = random_params(arch)
    layer = dict(params["layers"][1])
    layer["mlp"] = {"gate": layer["mlp"]["gate_proj"], **layer["mlp"]}
    del layer["mlp"]["gate_proj"]
    broken = params | {"layers": params["layers"] | {1: layer}}
    with pytest.raises(ValueError, match=r"missing layers\.1\.mlp\.gate_proj\.kernel") as error:
        run(arch, broken, ids())
    assert "unexpected layers.1.mlp.gate.kernel" in str(error.value)
    with pytest.raises(ValueError, match="unstacked"):
        run(arch, stack_layers(params), ids())


def test_tokens_and_embeddings_exclude_each_other():
    arch = tiny_arch("llama2")
    graphdef, params = build_decoder(arch), random_params(arch)
    with pytest.raises(ValueError, match="either tokens or input_embeddings"):
        hidden_states(graphdef, params, None, positions=positions())


LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
GEMMA2_27B = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "hidden_size": 4608,
    "intermediate_size": 36_864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
}


@pytest.mark.parametrize(
    ("config", "parameters"), [(LLAMA_70B, 70_553_706_496), (GEMMA2_27B, 27_227_128_320)]
)
def test_the_largest_models_have_their_published_size_without_allocating(config, parameters):
    arch = ArchConfig.from_hf(config)
    params = abstract_params(arch, param_dtype=jnp.bfloat16, scan_layers=True)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
    graphdef = build_decoder(arch, compute_dtype=jnp.bfloat16, scan_layers=True, remat="full")
    x = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    logits = jax.eval_shape(functools.partial(forward, graphdef), params, x, positions=x)
    assert (logits.shape, logits.dtype) == ((1, 4096, arch.vocab_size), jnp.float32)
