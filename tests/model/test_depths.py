"""A head that reads several depths: at first the last layer alone, in every form of a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decode_layout import to_decode_layout
from ivl_jax.model.decoder import (
    abstract_params,
    build_decoder,
    hidden_states,
    init_params,
    logits_from_hidden,
    stack_layers,
)
from ivl_jax.model.int8 import quantize
from ivl_jax.model.kv_cache import init_cache
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import architecture_from_json, architecture_to_json
from ivl_jax.model.projection import KernelForm
from ivl_jax.sharding import make_mesh, parameter_shardings
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_saving import save_params
from tests.model.families import random_params, tiny_arch, tokens

LENGTH = 6
IDS = jnp.asarray(tokens(2, LENGTH))
AT = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, 1))


def reading(name: str, depths: int = 3) -> ArchConfig:
    return dataclasses.replace(tiny_arch(name), head_depths=depths)


def hidden_of(arch, params, **options):
    return hidden_states(build_decoder(arch, **options), params, IDS, positions=AT)[0]


@pytest.mark.parametrize(("name", "depths"), [("llama3", 2), ("gemma2", 3)])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_fresh_head_reads_the_last_layer_alone(name, depths, scan):
    arch, plain = reading(name, depths), tiny_arch(name)
    params, without = (
        init_params(each, jax.random.key(0), scan_layers=scan) for each in (arch, plain)
    )
    added = params.pop("depths")
    assert added["router"]["kernel"].shape == (arch.hidden_size, depths - 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(added))
    jax.tree.map(np.testing.assert_array_equal, params, without)
    found = hidden_of(arch, params | {"depths": added}, scan_layers=scan)
    np.testing.assert_array_equal(found, hidden_of(plain, params, scan_layers=scan))


@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_the_heads_logits_are_the_mixture_of_each_depths_logits(name):
    arch = dataclasses.replace(reading(name), final_logit_softcapping=None)
    params = random_params(arch)
    graphdef = build_decoder(arch)
    states = hidden_of(arch, params, all_depths=True)
    mixed, *late = jnp.split(states, 3, axis=-1)
    np.testing.assert_array_equal(mixed, hidden_of(arch, params))
    plain = {name: part for name, part in params.items() if name != "depths"}
    last = hidden_of(tiny_arch(name), plain)
    for index, found in enumerate(late):  # each is what a shallower decoder gives its head
        layers = index + 1
        shallow = dataclasses.replace(
            tiny_arch(name), num_hidden_layers=layers, layer_types=arch.layer_types[:layers]
        )
        scale = params["norm"]["scale"] + params["depths"]["norm_offset"][index]
        part = plain | {
            "layers": {at: params["layers"][at] for at in range(layers)},
            "norm": {"scale": scale},
        }
        np.testing.assert_allclose(found, hidden_of(shallow, part), atol=1e-5)
    router = params["depths"]["router"]
    weights = np.asarray(last) @ np.asarray(router["kernel"]) + np.asarray(router["bias"])
    logits = [np.asarray(logits_from_hidden(graphdef, params, each)) for each in (*late, last)]
    expected = (1 - weights.sum(-1, keepdims=True)) * logits[-1]
    expected += sum(weights[..., [index]] * logits[index] for index in range(2))
    found = np.asarray(logits_from_hidden(graphdef, params, mixed))
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-4)
    assert np.abs(found - logits[-1]).max() > 0.5


def test_scanned_layers_give_the_same_depths():
    arch = reading("llama2", 2)
    params = random_params(arch)
    expected = hidden_of(arch, params, all_depths=True)
    found = hidden_of(arch, stack_layers(params), all_depths=True, scan_layers=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_tokens_read_one_by_one_with_a_cache_give_the_same(scan):
    arch = reading("llama3", 2)
    params = random_params(arch)
    params = stack_layers(params) if scan else params
    graphdef = build_decoder(arch, scan_layers=scan)
    cache = init_cache(arch, batch_size=2, capacity=LENGTH, dtype=jnp.float32, scan_layers=scan)
    found = []
    for index in range(LENGTH):
        one = slice(index, index + 1)
        hidden, cache = hidden_states(
            graphdef, params, IDS[:, one], positions=AT[:, one], cache=cache
        )
        found.append(hidden)
    expected = hidden_of(arch, params, scan_layers=scan)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-4)


@pytest.mark.parametrize(
    "form", [KernelForm(rows=True), KernelForm(int8=True), KernelForm(True, True)]
)
def test_the_router_stays_as_trained_in_every_form(form):
    arch = reading("llama_bias", 2)
    params = random_params(arch)
    turned = to_decode_layout(params) if form.rows else params
    turned = quantize(turned, rows=form.rows) if form.int8 else turned
    assert turned["depths"]["router"]["kernel"] is params["depths"]["router"]["kernel"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), turned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(arch, form=form)
    )
    found, exact = hidden_of(arch, turned, form=form), hidden_of(arch, params)
    np.testing.assert_allclose(found, exact, atol=0.5 if form.int8 else 1e-4)


def test_half_precision_rounds_the_mixture_once():
    arch, half = reading("llama2", 2), {"compute_dtype": jnp.bfloat16}
    params = random_params(arch)
    states = hidden_of(arch, params, all_depths=True, **half)
    assert states.dtype == jnp.bfloat16
    plain = {name: part for name, part in params.items() if name != "depths"}
    last = np.asarray(hidden_of(tiny_arch("llama2"), plain, **half), np.float32)
    mixed, late = np.split(np.asarray(states, np.float32), 2, axis=-1)
    router = params["depths"]["router"]
    weights = last @ np.asarray(router["kernel"]) + np.asarray(router["bias"])
    np.testing.assert_allclose(mixed, last + weights * (late - last), rtol=2**-8, atol=1e-3)


def test_it_is_split_over_the_residual_streams_devices():
    shardings = parameter_shardings(abstract_params(reading("llama2")), make_mesh(fsdp=4, tensor=2))
    assert shardings["depths"]["router"]["kernel"].spec == PartitionSpec("fsdp", None)
    assert shardings["depths"]["norm_offset"].spec == PartitionSpec(None, None)


def test_depths_are_written_only_where_there_are_several():
    arch = reading("qwen3")
    assert architecture_to_json(arch)["head_depths"] == 3
    assert architecture_from_json(architecture_to_json(arch)) == arch
    assert "head_depths" not in architecture_to_json(tiny_arch("qwen3"))
    assert arch.plain == tiny_arch("qwen3")
    assert LinearMapConfig(4).head_depths == 1


@pytest.mark.parametrize("depths", [0, 4])
def test_there_are_at_most_as_many_depths_as_layers(depths):
    with pytest.raises(ValueError, match=f"head_depths: got {depths}, expected 1 to .* layers, 3"):
        reading("llama2", depths)


def test_they_are_saved_and_loaded_with_the_rest(tmp_path):
    arch = reading("llama2")
    params = random_params(arch)
    save_params(tmp_path / "model", arch, params, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "model", arch), params)
    with pytest.raises(ValueError, match=r"model\.depths\.norm_offset: expected nothing"):
        load_params(tmp_path / "model", tiny_arch("llama2"))


def test_the_router_and_the_norms_learn():
    arch = reading("llama2")
    graphdef = build_decoder(arch)

    def loss(params):
        hidden, _ = hidden_states(graphdef, params, IDS, positions=AT)
        return jnp.sum(logits_from_hidden(graphdef, params, hidden) ** 2)

    fresh = random_params(tiny_arch("llama2")) | {
        "depths": init_params(arch, jax.random.key(0))["depths"]
    }
    gradient = jax.grad(loss)(fresh)["depths"]
    assert np.abs(gradient["router"]["kernel"]).min() > 0
    assert np.abs(gradient["router"]["bias"]).min() > 0
    assert np.abs(jax.grad(loss)(random_params(arch))["depths"]["norm_offset"]).min() > 0
