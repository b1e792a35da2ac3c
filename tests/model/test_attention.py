"""Attention is what JAX's own function computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.attention.plain import attend


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_the_function_of_jax(kv_heads):
    batch, length, slots, heads, width = 2, 5, 9, 6, 16
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (batch, length, heads, width))
    key, value = (jax.random.normal(each, (batch, slots, kv_heads, width)) for each in keys[1:])
    # Each query sees its row's slots up to its own position; the second row is further.
    positions = jnp.arange(length)[None, :] + jnp.asarray([[0], [4]])
    mask = jnp.arange(slots)[None, None, None, :] <= positions[:, None, :, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=0.3)
    found = attend(
        query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask=mask, scale=0.3, softcap=None
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
