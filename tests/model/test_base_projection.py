"""The optional projection of a base's hidden states: zero at first, in every form of a decoder."""

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
    embed,
    forward,
    hidden_states,
    init_params,
    project_base_hidden,
    stack_layers,
    zero_additions,
)
from ivl_jax.model.int8 import quantize
from ivl_jax.model.network import architecture_from_json, architecture_to_json
from ivl_jax.model.projection import KernelForm
from ivl_jax.sharding import make_mesh, parameter_shardings
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_saving import save_params
from tests.model.families import random_params, tiny_arch, tokens

BASE_WIDTH, LENGTH = 24, 6


def reading(name: str) -> ArchConfig:
    return dataclasses.replace(tiny_arch(name), base_hidden_size=BASE_WIDTH)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    ids = jnp.asarray(tokens(2, LENGTH))
    at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, 1))
    return ids, at, jax.random.normal(jax.random.key(3), (2, LENGTH, BASE_WIDTH))


def hidden_of(graphdef, params):
    """What a network says that reads tokens and base hidden states."""
    ids, at, base_hidden = inputs()
    both = embed(graphdef, params, ids) + project_base_hidden(graphdef, params, base_hidden)
    return hidden_states(graphdef, params, None, positions=at, input_embeddings=both)[0]


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_a_fresh_network_reads_only_text(name):
    arch, plain = reading(name), tiny_arch(name)
    params, without = init_params(arch, jax.random.key(0)), init_params(plain, jax.random.key(0))
    projection = params.pop("base_projection")
    assert projection["kernel"].shape == (BASE_WIDTH, arch.hidden_size)
    assert not np.any(projection["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params, without)
    added = without | zero_additions(arch, jnp.float32)
    assert jax.tree.structure(added) == jax.tree.structure(abstract_params(arch))
    ids, at, _ = inputs()
    expected, _ = hidden_states(build_decoder(plain), without, ids, positions=at)
    np.testing.assert_array_equal(hidden_of(build_decoder(arch), added), expected)


def test_what_it_projects_is_scaled_like_embeddings():
    base_hidden = inputs()[2]
    for name, scale in (("llama2", 1.0), ("gemma2", 32**0.5)):
        params = random_params(reading(name))
        graphdef = build_decoder(reading(name), compute_dtype=jnp.bfloat16)
        projected = project_base_hidden(graphdef, params, base_hidden)
        assert projected.dtype == jnp.bfloat16
        expected = scale * base_hidden @ params["base_projection"]["kernel"]
        np.testing.assert_allclose(projected.astype(jnp.float32), expected, rtol=0.05, atol=0.1)


def test_a_base_of_another_width_is_refused():
    params = random_params(reading("llama2"))
    graphdef = build_decoder(reading("llama2"))
    with pytest.raises(ValueError, match="base of width 24, got 7; use a base"):
        project_base_hidden(graphdef, params, jnp.zeros((1, 2, 7)))
    plain = tiny_arch("llama2")
    with pytest.raises(ValueError, match="width none, got 24"):
        project_base_hidden(build_decoder(plain), random_params(plain), inputs()[2])


@pytest.mark.parametrize(
    "form", [KernelForm(rows=True), KernelForm(int8=True), KernelForm(True, True)]
)
def test_it_stays_as_trained_in_every_form(form):
    arch = reading("llama_bias")
    params = random_params(arch)
    plain = {name: part for name, part in params.items() if name != "base_projection"}
    turned = to_decode_layout(params) if form.rows else params
    turned = quantize(turned, rows=form.rows) if form.int8 else turned
    assert turned["base_projection"]["kernel"] is params["base_projection"]["kernel"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), turned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(arch, form=form)
    )
    found = hidden_of(build_decoder(arch, form=form), turned)
    exact = hidden_of(build_decoder(arch), params)
    np.testing.assert_allclose(found, exact, atol=0.3 if form.int8 else 1e-4)
    assert (
        np.abs(
            exact - hidden_of(build_decoder(arch), plain | zero_additions(arch, jnp.float32))
        ).max()
        > 0.5
    )


def test_stacked_layers_leave_it_where_it_is():
    arch = reading("gemma3")
    params = random_params(arch)
    scanned = hidden_of(build_decoder(arch, scan_layers=True), stack_layers(params))
    np.testing.assert_allclose(scanned, hidden_of(build_decoder(arch), params), atol=1e-4)


def test_it_is_split_over_the_residual_streams_devices():
    shardings = parameter_shardings(abstract_params(reading("llama2")), make_mesh(fsdp=4, tensor=2))
    assert shardings["base_projection"]["kernel"].spec == PartitionSpec(None, "fsdp")


def test_its_width_is_written_only_where_there_is_one():
    arch = reading("qwen3")
    assert architecture_to_json(arch)["base_hidden_size"] == BASE_WIDTH
    assert architecture_from_json(architecture_to_json(arch)) == arch
    assert "base_hidden_size" not in architecture_to_json(tiny_arch("qwen3"))
    with pytest.raises(ValueError, match="base_hidden_size: got -1"):
        dataclasses.replace(arch, base_hidden_size=-1)


def test_it_is_saved_and_loaded_with_the_rest(tmp_path):
    arch = reading("llama2")
    params = random_params(arch)
    save_params(tmp_path / "model", arch, params, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "model", arch), params)
    with pytest.raises(ValueError, match=r"model\.base_projection\.weight: expected nothing"):
        load_params(tmp_path / "model", tiny_arch("llama2"))


def test_it_learns():
    arch = reading("llama2")
    params = random_params(arch) | zero_additions(arch, jnp.float32)
    graphdef = build_decoder(arch)
    gradient = jax.grad(lambda tree: jnp.sum(hidden_of(graphdef, tree) ** 3))(params)
    assert np.abs(gradient["base_projection"]["kernel"]).min() > 0
    ids, at, _ = inputs()
    unread = jax.grad(lambda tree: jnp.sum(forward(graphdef, tree, ids, positions=at) ** 2))(params)
    assert not np.any(unread["base_projection"]["kernel"])
