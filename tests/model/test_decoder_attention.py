"""A decoder in every form of attention: the same numbers, and no mask kept for each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.attention.form import PLAIN, AttentionForm
from ivl_jax.model.decoder import build_decoder, hidden_states, stack_layers
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
        ("gemma2", BLOCKED, True, "full"),
        pytest.param("gemma2", BLOCKED, False, "full", marks=pytest.mark.slow),
        pytest.param("gemma2", SPLASH, True, "dots", marks=pytest.mark.slow),
    ],
)
def test_every_form_gives_the_numbers_of_the_plain_one(name, attention, scan_layers, remat):
    found = value_and_gradients(name, attention, scan_layers, remat)
    expected = value_and_gradients(name, PLAIN, scan_layers, remat)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("attention", [PLAIN, BLOCKED, SPLASH])
def test_no_scanned_layer_keeps_a_mask(attention, remat):
    kept = kept_by_each_layer("gemma2", attention, remat)
    assert ("float32", (2, 50, 32)) in kept  # the residual stream
    assert not [shape for dtype, shape in kept if dtype == "bool" and shape[-2:] == (50, 50)]
    scores = [shape for _, shape in kept if shape[-2:] in ((50, 50), (100, 50))]
    assert bool(scores) == (attention is PLAIN and remat == "none")


@pytest.mark.parametrize("attention", [PLAIN, BLOCKED, SPLASH])
def test_dots_keeps_the_results_of_projections_and_of_attention(attention):
    names = {"q": (2, 50, 64), "k": (2, 50, 32), "gate and up": (2, 50, 48)}
    full = kept_by_each_layer("gemma2", attention, "full")
    dots = kept_by_each_layer("gemma2", attention, "dots")
    assert set(full) == {("float32", (2, 50, 32))}
    assert set(names.values()) <= {shape for _, shape in dots}
    widths = {shape[-1] for _, shape in dots if shape[:2] == (2, 50)}
    attended = {"blocked": (2, 50, 4, 16), "splash": (2, 4, 128, 16)}
    assert attention is PLAIN or attended[attention.name] in {shape for _, shape in dots}
    assert widths <= {64, 32, 48, 16}


def kept_by_each_layer(name, attention, remat):
    """(dtype, shape) of what the forward scan over layers stacks for the backward pass."""
    params = stack_layers(random_params(tiny_arch(name)))
    options = {"attention": attention, "scan_layers": True, "remat": remat}
    loss = functools.partial(total, name=name, **options)
    traced = jax.make_jaxpr(lambda params: jax.vjp(loss, params, has_aux=True)[1])(params)
    layers = tiny_arch(name).num_hidden_layers
    return [
        (str(aval.dtype), aval.shape[1:])
        for equation in traced.jaxpr.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == layers
        for aval in (variable.aval for variable in equation.outvars)
        if aval.shape[:1] == (layers,)
    ]
