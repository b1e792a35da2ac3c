"""A base whose kernels are int8: near the float base, the same on every layout."""

import jax
import numpy as np
import pytest

from ivl_jax.composed.kernel_form import lay_out_network
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.evaluation.scoring import Row, score_rows
from ivl_jax.model.decoder import logits_from_hidden
from ivl_jax.model.network import build_network, init_network
from ivl_jax.sharding import bytes_per_device, make_mesh
from tests.decoding.conftest import make_value
from tests.decoding.tiny import tiny_arch

TEXT = "Once upon a time there was a little girl named Lily. She liked to play in the park."


@pytest.fixture(scope="module")
def value(stories):
    return make_value(stories, arch=tiny_arch(width=16, heads=2, kv_heads=1, rows=512, context=512))


def log_probs(model):
    ((_, scores),) = score_rows(model, [Row(model.encode(TEXT))], batch_size=1)
    return scores.tokens.log_prob


def test_the_text_is_nearly_as_likely_and_the_value_network_stays_a_float(stories, value):
    exact = compose(stories, value, strengths=[0.1])
    near = compose(stories, value, strengths=[0.1], int8_base=True)
    gap = np.abs(log_probs(near) - log_probs(exact))
    assert 0 < gap.mean() < 0.02
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(near.params.base["layers"])}
    assert dtypes == {"int8", "float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(near.params.values[0].params)} == {
        "float32"
    }
    kernels = [m.params.base["layers"][0]["mlp"]["down_proj"]["kernel"] for m in (exact, near)]
    assert kernels[1].nbytes * 4 == kernels[0].nbytes


def test_a_mesh_splits_kernels_and_scales_and_says_the_same(stories, value):
    options = GenerationOptions(max_new_tokens=16)
    alone = compose(stories, value, strengths=[0.1], int8_base=True)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    split = compose(stories, value, strengths=[0.1], mesh=mesh, int8_base=True)
    assert split.generate([TEXT], options) == alone.generate([TEXT], options)
    kernel = split.params.base["layers"][0]["mlp"]["down_proj"]["kernel"]
    assert set(bytes_per_device(kernel).values()) == {kernel.nbytes // 4}


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_a_prime_number_of_rows_is_multiplied_in_large_tiles(tied):
    arch = tiny_arch(rows=67, tied=tied)
    params = init_network(arch, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (1, 3, arch.hidden_size))
    exact = logits_from_hidden(build_network(arch), params, hidden)
    graphdef, laid_out = lay_out_network(params, arch, None, int8=True)
    near = logits_from_hidden(graphdef, laid_out, hidden)
    assert near.shape[-1] == 128
    gap = np.abs(near[..., :67] - exact)
    assert 0 < gap.max() < 0.02 * np.abs(exact).max()
    assert not near[..., 67:].any()


@pytest.mark.parametrize("int8_base", [False, True])
def test_what_is_composed_can_be_composed_again(stories, value, int8_base):
    options = GenerationOptions(max_new_tokens=8)
    model = compose(stories, value, strengths=[0.1], int8_base=int8_base)
    again = compose(model.base, *model.values, strengths=[0.1])
    assert again.generate([TEXT], options) == model.generate([TEXT], options)
    rounded = compose(model.base, strengths=[], int8_base=True)
    assert (
        rounded.composition.base.graphdef
        == compose(stories, int8_base=True).composition.base.graphdef
    )
    with pytest.raises(
        ValueError, match="cannot be placed on a mesh: compose the model as it was load"
    ):
        compose(model.base, mesh=make_mesh(data=2))
