"""Adapters: nothing at first, then equal to the kernels that they are merged into."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.decoder import abstract_params, build_decoder, forward, stack_layers
from ivl_jax.model.int8 import quantize
from ivl_jax.model.lora import adapter_shapes, init_adapter, join, merge
from ivl_jax.model.projection import KernelForm, Lora
from ivl_jax.sharding import make_mesh, parameter_shardings
from ivl_jax.tree_compare import named_leaves
from tests.model.families import random_params, tiny_arch, tokens

LORA = Lora(rank=3, alpha=6.0, targets="all-linear")
LENGTH = 6


def adapter_of(arch, lora=LORA, *, scan_layers=False):
    """An adapter whose B is not zero."""
    zero = init_adapter(arch, lora, jax.random.key(5), scan_layers=scan_layers)
    return jax.tree.map(lambda leaf: leaf if leaf.any() else leaf + 0.1, zero)


def logits(arch, params, **options):
    ids = jnp.asarray(tokens(2, LENGTH))
    at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, 1))
    return np.asarray(forward(build_decoder(arch, **options), params, ids, positions=at))


@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])  # with biases; a tied head
def test_a_new_adapter_changes_nothing_and_a_trained_one_equals_its_merged_kernels(name):
    arch = tiny_arch(name)
    params, form = random_params(arch), KernelForm(lora=LORA)
    plain = logits(arch, params)
    new = init_adapter(arch, LORA, jax.random.key(5))
    np.testing.assert_array_equal(logits(arch, join(new, params), form=form), plain)
    joined = join(adapter_of(arch), params)
    adapted = logits(arch, joined, form=form)
    assert np.abs(adapted - plain).max() > 0.01
    merged = merge(joined, LORA, dtype=jnp.float32)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(logits(arch, merged), adapted, rtol=1e-3, atol=1e-4)


def test_scanned_layers_and_int8_kernels_have_adapters_too():
    arch = tiny_arch("llama_bias")
    params, adapter = quantize(random_params(arch), rows=False), adapter_of(arch)
    form = KernelForm(int8=True, lora=LORA)
    unrolled = logits(arch, join(adapter, params), form=form)
    merged = merge(join(adapter, params), LORA, dtype=jnp.float32)
    np.testing.assert_allclose(logits(arch, merged), unrolled, rtol=1e-3, atol=1e-3)
    joined = join(adapter_of(arch, scan_layers=True), stack_layers(params))
    scanned = logits(arch, joined, form=form, scan_layers=True)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-4, atol=1e-4)


def test_the_merged_kernel_is_rounded_once_after_the_sum_in_float32():
    kernel, a, b = (jnp.full((1, 1), x, jnp.float32) for x in (256.75, 1.0, 1.0))
    joined = {"kernel": kernel, "lora_a": a, "lora_b": b}
    # 257.25 becomes bfloat16's 258; rounded before the sum, 256 + 0.5 would become 256.
    merged = merge(joined, Lora(2, 1.0, "mlp"), dtype=jnp.bfloat16)
    assert merged["kernel"].dtype == jnp.bfloat16
    assert float(merged["kernel"][0, 0]) == 258.0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {*"qkvo", "gate", "up", "down"}),
    ],
)
def test_targets_say_which_projections_have_an_adapter_and_never_the_head(targets, expected):
    lora = dataclasses.replace(LORA, targets=targets)
    paths = [path.split(".") for path in named_leaves(adapter_shapes(tiny_arch("llama2"), lora))]
    assert {path[0] for path in paths} == {"layers"}
    assert {path[-2].removesuffix("_proj") for path in paths} == {
        name.removesuffix("_proj") for name in expected
    }
    assert {path[-1] for path in paths} == {"lora_a", "lora_b"}


def test_what_only_a_value_network_has_is_trained_with_its_adapter():
    arch = dataclasses.replace(tiny_arch("llama2"), base_hidden_size=24)
    assert adapter_shapes(arch, LORA)["base_projection"]["kernel"].shape == (24, 32)


def test_a_is_uniform_in_the_inverse_root_of_its_input_whether_or_not_layers_are_scanned():
    arch = tiny_arch("llama2")
    adapter = init_adapter(arch, LORA, jax.random.key(0))
    down = np.asarray(adapter["layers"][1]["mlp"]["down_proj"]["lora_a"])
    assert 0.9 * 48**-0.5 < np.abs(down).max() <= 48**-0.5
    scanned = init_adapter(arch, LORA, jax.random.key(0), scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, scanned, stack_layers(adapter))
    shapes = adapter_shapes(arch, LORA, scan_layers=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), scanned) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


def test_an_adapter_is_split_over_a_mesh_like_the_kernel_that_it_changes():
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    shapes = abstract_params(tiny_arch("llama2"), form=KernelForm(lora=LORA))
    layer = parameter_shardings(shapes, mesh)["layers"][0]
    for projection in (*layer["self_attn"].values(), *layer["mlp"].values()):
        rows, columns = projection["kernel"].spec
        assert tuple(projection["lora_a"].spec) == (rows, None)
        assert tuple(projection["lora_b"].spec) == (None, columns)


def test_parameters_without_their_adapter_are_named():
    arch = tiny_arch("llama2")
    with pytest.raises(ValueError, match=r"with an adapter \(lora.join\)[\s\S]*missing .*lora_a"):
        logits(arch, random_params(arch), form=KernelForm(lora=LORA))
