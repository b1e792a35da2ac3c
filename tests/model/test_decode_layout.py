"""The form of parameters that decodes fastest on CPU gives the same logits as the trained form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.decode_layout import to_decode_layout
from ivl_jax.model.decoder import (
    abstract_params,
    build_decoder,
    forward,
    hidden_states,
    logits_from_hidden,
)
from ivl_jax.model.kv_cache import init_cache
from ivl_jax.model.projection import KernelForm
from tests.model.families import FAMILIES, NAMES, random_params, tiny_arch, tokens

LENGTH = 12


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_the_trained_form_with_and_without_a_cache(name):
    arch = tiny_arch(name)
    params = random_params(arch)
    ids = jnp.asarray(tokens(2, LENGTH))
    at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, 1))
    expected = forward(build_decoder(arch), params, ids, positions=at)
    laid_out, decoder = to_decode_layout(params), build_decoder(arch, form=KernelForm(rows=True))
    found = forward(decoder, laid_out, ids, positions=at)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    cache = init_cache(arch, batch_size=2, capacity=LENGTH, dtype=jnp.float32)
    pieces = []
    for part in (slice(0, LENGTH - 1), slice(LENGTH - 1, LENGTH)):
        hidden, cache = hidden_states(
            decoder, laid_out, ids[:, part], positions=at[:, part], cache=cache
        )
        pieces.append(logits_from_hidden(decoder, laid_out, hidden))
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_the_same_numbers_in_the_shapes_that_are_announced(name):
    arch = tiny_arch(name)
    params = random_params(arch)
    laid_out = to_decode_layout(params)
    announced = abstract_params(arch, form=KernelForm(rows=True))
    assert shapes(laid_out) == shapes(announced)
    assert laid_out["embed_tokens"]["embedding"] is params["embed_tokens"]["embedding"]
    assert ("lm_head" in laid_out) == ("lm_head" in params)
    assert total(laid_out) == pytest.approx(total(params), rel=1e-5)


def test_parameters_of_the_other_form_are_refused_by_name():
    arch = tiny_arch(NAMES[0])
    params = random_params(arch)
    ids = jnp.asarray(tokens(1, 2))
    at = jnp.asarray([[0, 1]], jnp.int32)
    with pytest.raises(ValueError, match=r"arranged for decoding(.|\n)*missing .*gate_up_proj"):
        forward(build_decoder(arch, form=KernelForm(rows=True)), params, ids, positions=at)
    with pytest.raises(ValueError, match=r"unexpected .*qkv_proj"):
        forward(build_decoder(arch), to_decode_layout(params), ids, positions=at)


def shapes(params):
    return jax.tree.map(lambda leaf: leaf.shape, params)


def total(params):
    return sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(params))
