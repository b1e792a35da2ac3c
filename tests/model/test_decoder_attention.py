"""A decoder in every form of attention: the same numbers, and no mask kept for each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.attention.form import PLAIN, AttentionForm
from ivl_jax.model.decoder import build_decoder, hidden_states, stack_layers
from tests.jaxprs import equations
from tests.model.families import random_params, tiny_arch, tokens

TOKENS = jnp.asarray(tokens(2, 50))
SEGMENTS = jnp.asarray(np.repeat([[1] * 15 + [2] * 29 + [0] * 6], 2, axis=0))
POSITIONS = jnp.tile(jnp.arange(50, dtype=jnp.int32)[None], (2, 1))
BLOCKED, SPLASH = AttentionForm("blocked", block=16), AttentionForm("splash", interpret=True)


def total(params, *, name, attention, **options):
    graphdef = build_decoder(tiny_arch(name), attention=attention, **options)
    hidden, _ = hidden_states(graphdef, params, TOKENS, positions=POSITIONS, segment_ids=SEGMENTS)
    weights = jnp.cos(jnp.arange(hidden.shape[-1], dtype=jnp.float32))
    return jnp.sum(hidden @ weights), hidden


@functools.cache
def value_and_gradients(name, attention, scan_layers, remat):
    params = stack_layers(random_params(tiny_arch(name)))
    if not scan_layers:
        params = random_params(tiny_arch(name))
    options = {"attention": attention, "scan_layers": scan_layers, "remat": remat}
    loss = functools.partial(total, name=name, **options)
    return jax.jit(jax.grad(loss, has_aux=True))(params)


# Gemma's layers slide or not, so that a scan switches between windows; Gemma 2 has a soft cap.
@pytest.mark.parametrize(
    ("name", "attention", "scan_layers", "remat"),
    [
        ("gemma2", BLOCKED, True, True),
        ("gemma2", BLOCKED, False, True),
        ("gemma2", SPLASH, True, False),
    ],
)
def test_every_form_gives_the_numbers_of_the_plain_one(name, attention, scan_layers, remat):
    found = value_and_gradients(name, attention, scan_layers, remat)
    expected = value_and_gradients(name, PLAIN, scan_layers, remat)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


@pytest.mark.parametrize("attention", [PLAIN, BLOCKED, SPLASH])
def test_no_scanned_layer_keeps_a_mask_or_scores(attention):
    params = stack_layers(random_params(tiny_arch("gemma2")))
    options = {"attention": attention, "scan_layers": True, "remat": True}
    loss = functools.partial(total, name="gemma2", **options)
    traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(params)
    layers = tiny_arch("gemma2").num_hidden_layers
    shapes = [
        variable.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "scan"
        for variable in equation.outvars
    ]
    assert (layers, 2, 50, 32) in shapes  # what each layer keeps: the residual stream
    assert not [shape for shape in shapes if shape[:1] == (layers,) and shape[-2:] == (50, 50)]
