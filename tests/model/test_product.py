"""Products: einsum's numbers in float32; in bfloat16 no factor is wider, forward or backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.product import multiply
from tests.jaxprs import multiplied_dtypes

CONTRACTIONS = {
    "bti,io->bto": ((2, 5, 8), (8, 6)),
    "btd,vd->btv": ((2, 5, 8), (7, 8)),
    "bkmh,bksh->bkms": ((2, 3, 5, 4), (2, 3, 6, 4)),
    "bkms,bksh->bkmh": ((2, 3, 5, 6), (2, 3, 6, 4)),
}


def factors(contraction, x_dtype=jnp.float32):
    x, y = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate(CONTRACTIONS[contraction])
    )
    return x.astype(x_dtype), y


@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_float32_product_and_gradients_are_those_of_einsum(contraction):
    def total(product, x, y):
        return jnp.sum(jnp.sin(product(x, y)))

    def ours(x, y):
        return multiply(contraction, x, y, dtype=jnp.float32)

    def plain(x, y):
        return jnp.einsum(contraction, x, y)

    x, y = factors(contraction)
    np.testing.assert_allclose(ours(x, y), plain(x, y), rtol=1e-6, atol=1e-6)
    gradients = [jax.grad(total, argnums=(1, 2))(product, x, y) for product in (ours, plain)]
    for mine, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_bfloat16_activations_are_multiplied_in_bfloat16_both_ways(contraction, dtype):
    def total(x, y):
        return jnp.sum(multiply(contraction, x, y, dtype=dtype).astype(jnp.float32))

    x, y = factors(contraction, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x, y).jaxpr
    found = multiplied_dtypes(jaxpr)
    assert len(found) >= 4
    assert set(found) == {"bfloat16"}


def test_gradient_of_a_float32_parameter_is_not_rounded():
    x, kernel = factors("bti,io->bto", jnp.bfloat16)

    def total(kernel):
        y = multiply("bti,io->bto", x, kernel, dtype=jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.grad(total)(kernel)
    assert gradient.dtype == jnp.float32
    # The gradient of the product is 1 everywhere: exact in bfloat16, as are the activations.
    exact = np.asarray(x, np.float64).sum(axis=(0, 1))[:, None].repeat(kernel.shape[1], axis=1)
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(gradient, gradient.astype(jnp.bfloat16).astype(jnp.float32))
