"""A sibling of a model has its first and last layers, and computes as they do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.config import ConfigError
from ivl_jax.experiments.real.layer_sibling import kept_layers, make_sibling, sibling_arch
from ivl_jax.model.decoder import build_decoder, forward
from ivl_jax.weights.language_model import load_language_model
from tests.training.conftest import save_tiny_model
from tests.training.tiny import make_arch


def _logits(arch, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    graphdef = build_decoder(arch, compute_dtype=jnp.float32)
    return forward(graphdef, params, tokens, positions=positions)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """A tiny model of five layers."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    return save_tiny_model(folder, seed=3, num_hidden_layers=5)


def test_a_sibling_is_a_model_folder_with_the_kept_layers_and_all_else_unchanged(
    whole_folder, tmp_path
):
    folder = tmp_path / "sibling"
    make_sibling(whole_folder, folder, first=2, last=1)
    whole, sibling = load_language_model(whole_folder), load_language_model(folder)
    assert sibling.arch == dataclasses.replace(
        whole.arch, num_hidden_layers=3, layer_types=whole.arch.layer_types[:3]
    )
    assert sibling.tokenizer_info == whole.tokenizer_info
    assert sibling.stop_ids == whole.stop_ids
    layers = whole.params["layers"]
    expected = {**whole.params, "layers": {0: layers[0], 1: layers[1], 2: layers[4]}}
    jax.tree.map(np.testing.assert_array_equal, sibling.params, expected)


def test_a_model_whose_other_layers_add_nothing_predicts_as_its_sibling(whole_folder, tmp_path):
    whole = load_language_model(whole_folder)
    params = jax.tree.map(jnp.copy, whole.params)
    for index in (2, 3):
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            kernel = params["layers"][index][part][name]["kernel"]
            params["layers"][index][part][name]["kernel"] = jnp.zeros_like(kernel)
    make_sibling(whole_folder, tmp_path / "sibling", first=2, last=1)
    sibling = load_language_model(tmp_path / "sibling")
    tokens = jnp.asarray([[1, 60, 17, 200, 3, 44]], jnp.int32)
    np.testing.assert_allclose(
        _logits(whole.arch, params, tokens),
        _logits(sibling.arch, sibling.params, tokens),
        atol=1e-5,
    )


@pytest.mark.parametrize(("first", "last"), [(0, 2), (2, 0), (3, 2), (5, 5)])
def test_layers_that_a_model_does_not_have_are_refused_before_its_weights_are_read(
    whole_folder, tmp_path, first, last
):
    with pytest.raises(ConfigError, match=f"first = {first} and last = {last}.* fewer than 5"):
        make_sibling(whole_folder, tmp_path / "sibling", first=first, last=last)
    assert not (tmp_path / "sibling").exists()


def test_what_differs_from_layer_to_layer_follows_its_layer():
    kinds = ("full_attention", *("sliding_attention",) * 3, "full_attention")
    arch = dataclasses.replace(
        make_arch(num_hidden_layers=5),
        layer_types=kinds,
        sliding_window=4,
        rotary_layers=(True, False, True, True, False),
    )
    found = sibling_arch(arch, kept_layers(2, 1, layers=5))
    assert found.layer_types == ("full_attention", "sliding_attention", "full_attention")
    assert found.rotary_layers == (True, False, False)
    assert found.sliding_window == 4
    assert sibling_arch(arch, (0, 4)).sliding_window is None
