"""cuDNN's flash attention, through JAX's own function, where a trial shows that it works.

In: the dtype and width of heads. Out: whether attention without a cache may go that way. JAX never
chooses cuDNN by itself, and refuses it late: by GPU, by its version, by shapes.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

logger = logging.getLogger(__name__)

_WIDEST_HEAD = 128
_TRIAL_TOKENS = 64
# Of results and gradients near 1 in size; bfloat16 has 8 bits.
_TOLERANCE = 0.05


def fused_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    mask: Bool[Array, "#B 1 T T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attend through cuDNN; only where `has_fused_attention` says so.

    Args:
        query: Rotated queries.
        key: Rotated keys.
        value: Values.
        mask: True where a query sees a key.
        scale: Factor on the scores.

    Returns:
        The attended values in the query's dtype.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation="cudnn"
        )


def has_fused_attention(*, dtype: DTypeLike, head_dim: int, length: int) -> bool:
    """Whether attention over this call's own keys may go through cuDNN.

    On one GPU, in 16-bit floats. Several devices keep XLA's form: cuDNN's wants queries, keys and
    values sharded alike, which few key-value heads cannot be.

    Args:
        dtype: Of queries, keys and values.
        head_dim: Width of a head.
        length: Tokens a row, T; an odd one has no gradient there.

    Returns:
        What a trial on this machine found, once for each dtype and width.
    """
    fits = head_dim % 8 == 0 and head_dim <= _WIDEST_HEAD and length % 2 == 0
    is_16_bit = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if not (fits and is_16_bit and jax.default_backend() == "gpu" and jax.device_count() == 1):
        return False
    return _passes_trial(jnp.dtype(dtype).name, head_dim)


@functools.cache
def _passes_trial(dtype: str, head_dim: int) -> bool:
    """Compare cuDNN's attention and its gradient with XLA's on two short rows."""
    rng = np.random.default_rng(0)
    shapes = [(2, _TRIAL_TOKENS, heads, head_dim) for heads in (4, 2, 2)]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    # Each row holds two segments, of other lengths in the other row.
    segments = np.arange(_TRIAL_TOKENS)[None, :] >= np.array([[20], [33]])
    mask = np.tril(segments[:, None, :, None] == segments[:, None, None, :])

    def gradients(implementation: Literal["cudnn", "xla"]) -> list[np.ndarray]:
        def total(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
            mixed = jax.nn.dot_product_attention(
                query, key, value, mask=jnp.asarray(mask), implementation=implementation
            )
            return jnp.sum(jnp.square(mixed.astype(jnp.float32))), mixed

        with_gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
        (_, mixed), found = jax.jit(with_gradient)(*arrays)
        return [np.asarray(each, np.float32) for each in (mixed, *found)]

    try:
        # The caller may be in the middle of tracing a program; this is none of its operations. And
        # JAX's function mixes dtypes, which a strict caller forbids.
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            pairs = list(zip(gradients("cudnn"), gradients("xla"), strict=True))
    except Exception as error:  # whatever cuDNN, its loader or its checks raise on a machine
        logger.info("attention stays XLA's: cuDNN's does not run here (%s)", error)
        return False
    agrees = all(np.allclose(one, other, atol=_TOLERANCE, rtol=_TOLERANCE) for one, other in pairs)
    if not agrees:
        logger.warning("attention stays XLA's: cuDNN's gives other numbers on this machine")
    return agrees
