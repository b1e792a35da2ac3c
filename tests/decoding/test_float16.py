"""float16, for GPUs without bfloat16: parameters, computation and caches are half as large."""

import jax
import jax.numpy as jnp
import numpy as np

from ivl_jax.decoding.compose import compose
from ivl_jax.evaluation.scoring import Row, score_rows


def log_probs(model):
    row = Row(model.encode("Once upon a time there was a little girl named Lily."))
    ((_, scores),) = score_rows(model, [row], batch_size=1)
    return scores.tokens.log_prob


def test_a_text_is_nearly_as_likely_in_float16(stories260k_dir):
    exact, half = (
        compose(stories260k_dir, param_dtype=dtype) for dtype in (jnp.float32, jnp.float16)
    )
    gap = np.abs(log_probs(half) - log_probs(exact))
    assert 0 < gap.mean() < 0.01
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"float16"}
    assert half.composition.base.cache_dtype == "float16"
