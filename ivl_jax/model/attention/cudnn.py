"""cuDNN's flash attention, through JAX's own function.

In: queries, keys and values of one device. Out: the attended values. JAX never chooses cuDNN on its
own; `form` decides where it is used.
"""

import jax
from jaxtyping import Array, Float, Int

from ivl_jax.model.attention.visibility import own_mask


def cudnn(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    *,
    segmented: bool,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Causal attention over this call's own keys, on one device.

    The kernel itself leaves out later keys and those beyond the window. Segments become a mask,
    which JAX turns into a bias [B 1 T T] in the compute dtype: the only array that grows with T²,
    and it has no head axis.

    Args:
        query: Rotated queries, in 16-bit floats.
        keys: Rotated keys, heads first.
        values: Values, heads first.
        segment_ids: Queries see keys of their own segment only.
        segmented: Rows may hold several segments; else the ids are not read.
        window: The most keys that a query sees, its own included; None: no limit.
        scale: Factor on the scores.

    Returns:
        The attended values in the query's dtype.
    """
    mask = own_mask(query.shape[1], segment_ids, window) if segmented else None
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            query,
            keys.swapaxes(1, 2),
            values.swapaxes(1, 2),
            mask=mask,
            is_causal=True,
            local_window_size=None if window is None or segmented else (window - 1, 0),
            scale=scale,
            implementation="cudnn",
        )
