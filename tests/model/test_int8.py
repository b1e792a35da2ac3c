"""Int8 kernels: near the float ones, equal to what they say they round to, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ivl_jax.model.decode_layout import to_decode_layout
from ivl_jax.model.decoder import abstract_params, build_decoder, forward, stack_layers
from ivl_jax.model.int8 import quantize, without_scales
from ivl_jax.model.projection import KernelForm, project
from ivl_jax.sharding import make_mesh, parameter_shardings
from tests.model.families import NAMES, random_params, tiny_arch, tokens

LENGTH = 6
FORMS = [KernelForm(rows=rows, int8=True) for rows in (False, True)]


def dequantized(params, *, rows):
    """The float kernels that int8 ones stand for, written out plainly."""
    if "kernel" in params:
        scale = params["scale"][..., :, None] if rows else params["scale"][..., None, :]
        return without_scales(params) | {"kernel": params["kernel"].astype(jnp.float32) * scale}
    return {
        name: dequantized(part, rows=rows) if isinstance(part, dict) else part
        for name, part in params.items()
    }


@pytest.mark.parametrize("form", FORMS, ids=["as trained", "rows"])
@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])  # a tied head too
def test_logits_are_those_of_the_rounded_float_kernels(name, form):
    arch = tiny_arch(name)
    params = random_params(arch)
    laid_out = to_decode_layout(params) if form.rows else params
    rounded = quantize(laid_out, rows=form.rows)
    ids = jnp.asarray(tokens(2, LENGTH))
    at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, 1))
    floats = build_decoder(arch, form=KernelForm(rows=form.rows))
    expected = forward(floats, dequantized(rounded, rows=form.rows), ids, positions=at)
    found = forward(build_decoder(arch, form=form), rounded, ids, positions=at)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert shapes(rounded) == shapes(abstract_params(arch, form=form))
    assert jax.tree.structure(without_scales(rounded)) == jax.tree.structure(laid_out)


def test_each_weight_is_off_by_at_most_half_its_scale_and_zeros_stay_zero():
    kernel = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    kernel[:, 2] = 0.0
    rounded = quantize({"kernel": jnp.asarray(kernel)}, rows=False)
    assert rounded["kernel"].dtype == jnp.int8
    found = dequantized(rounded, rows=False)["kernel"]
    assert (np.abs(found - kernel) <= 0.5001 * rounded["scale"][None, :]).all()
    assert (np.abs(np.asarray(rounded["kernel"])).max(0) == [127, 127, 0, 127, 127]).all()


def test_stacked_layers_are_rounded_each_for_itself():
    arch = tiny_arch(NAMES[0])
    params = random_params(arch)
    apart, together = quantize(params, rows=False), quantize(stack_layers(params), rows=False)
    assert shapes(stack_layers(apart)) == shapes(together)
    for one, other in zip(
        jax.tree.leaves(stack_layers(apart)), jax.tree.leaves(together), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("features", [1, 2, 7, 768, 1500, 2053])
def test_any_number_of_output_features_is_tiled(features):
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.integers(-127, 128, (features, 9), np.int8))
    scale = jnp.asarray(rng.random(features), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 3, 9)), jnp.float32)
    found = project(x, kernel, scale, rows=True, dtype=jnp.float32)
    expected = np.einsum("bti,oi->bto", x, np.asarray(kernel, np.float32)) * np.asarray(scale)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_kernels_and_their_scales_are_split_alike():
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    shapes_of = abstract_params(tiny_arch(NAMES[0]), form=KernelForm(int8=True))
    projection = parameter_shardings(shapes_of, mesh)["layers"][0]["self_attn"]["q_proj"]
    assert projection["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert projection["scale"].spec == PartitionSpec("tensor")


def shapes(params):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), params)
