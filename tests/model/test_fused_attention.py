"""When cuDNN's attention is taken; `jax.nn.dot_product_attention` stands in for it on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model import fused_attention
from ivl_jax.model.decoder import build_decoder, hidden_states
from ivl_jax.model.kv_cache import init_cache
from tests.model.families import random_params, tiny_arch, tokens

REAL = jax.nn.dot_product_attention
TOKENS = jnp.asarray(tokens(2, 40))
SEGMENTS = jnp.asarray(np.repeat([[1] * 15 + [2] * 20 + [0] * 5], 2, axis=0))


class Gpu:
    """One GPU, whose cuDNN does what `xla` does, unless told otherwise."""

    def __init__(self):
        self.calls = 0
        self.error = None
        self.factor = 1.0

    def attention(self, *arrays, implementation=None, **options):
        if implementation != "cudnn":
            return REAL(*arrays, implementation=implementation, **options)
        self.calls += 1
        if self.error is not None:
            raise self.error
        return REAL(*arrays, implementation="xla", **options) * self.factor


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(jax.nn, "dot_product_attention", gpu.attention)
    monkeypatch.setattr(fused_attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention.jax, "device_count", lambda: 1)
    fused_attention._passes_trial.cache_clear()
    yield gpu
    fused_attention._passes_trial.cache_clear()


def hidden(name="llama3", *, dtype=jnp.bfloat16, tokens=TOKENS, cached=False):
    arch = tiny_arch(name)
    graphdef = build_decoder(arch, compute_dtype=dtype)
    positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (2, 1))
    where = {"segment_ids": SEGMENTS[:, : tokens.shape[1]]}
    if cached:
        where = {"cache": init_cache(arch, batch_size=2, capacity=64, dtype=dtype)}
    run = jax.jit(
        lambda params: hidden_states(graphdef, params, tokens, positions=positions, **where)
    )
    return np.asarray(run(random_params(arch))[0], np.float32)


@pytest.mark.parametrize("name", ["llama3", "qwen2_window"])
def test_packed_rows_on_a_gpu_go_through_cudnn_and_give_the_same(gpu, name):
    found = hidden(name)
    calls = gpu.calls
    assert calls > 1  # the trial, and a layer
    hidden(name, tokens=TOKENS[:, :32])
    assert gpu.calls < 2 * calls  # no second trial
    gpu.error = NotImplementedError("not this machine")
    fused_attention._passes_trial.cache_clear()
    np.testing.assert_allclose(found, hidden(name), atol=0.06)


def test_a_cudnn_that_raises_or_errs_is_not_used(gpu, caplog):
    gpu.error = RuntimeError("cuDNN is not detected.")
    expected = hidden()
    assert gpu.calls == 1
    gpu.error, gpu.factor = None, 1.5
    fused_attention._passes_trial.cache_clear()
    np.testing.assert_array_equal(hidden(), expected)
    assert "cuDNN's gives other numbers on this machine" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        {"dtype": jnp.float32},
        {"name": "gemma2"},  # a soft cap
        {"tokens": TOKENS[:, :39]},  # an odd length
        {"cached": True},
    ],
    ids=str,
)
def test_what_cudnn_cannot_do_is_not_asked_of_it(gpu, call):
    hidden(**call)
    trials = gpu.calls
    gpu.error = AssertionError
    hidden(**call)
    assert gpu.calls == trials <= 1
