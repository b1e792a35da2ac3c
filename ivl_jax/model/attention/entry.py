"""Attention over a call's own keys in any form: the one entry for calls without a cache.

In: queries, keys, values, segment ids, and the layer's window. Out: the attended values. No mask
is passed in: each form builds the part that it needs.
"""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ivl_jax.model.attention.blocked import attend_in_blocks
from ivl_jax.model.attention.cudnn import cudnn
from ivl_jax.model.attention.form import AttentionForm
from ivl_jax.model.attention.over_mesh import run_over_mesh
from ivl_jax.model.attention.plain import attend
from ivl_jax.model.attention.splash import splash
from ivl_jax.model.attention.visibility import own_mask


def attend_to_own(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    *,
    form: AttentionForm,
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Causal attention of each token over itself and earlier ones of its segment and window.

    Args:
        query: Rotated queries.
        keys: Rotated keys, heads first.
        values: Values, heads first.
        form: How it is computed.
        segment_ids: 0 padding, 1.. sequences packed in a row; None: one sequence.
        window: The most keys that a query sees, its own included; None: no limit.
        scale: Factor on the scores.
        softcap: Scores become c·tanh(score / c); None: no cap.

    Returns:
        The attended values in the query's dtype.
    """
    name = form.at_length(query.shape[1])
    if name == "plain":
        mask = own_mask(query.shape[1], segment_ids, window)
        return attend(query, keys, values, mask=mask, scale=scale, softcap=softcap)
    if name == "blocked":
        return attend_in_blocks(
            query,
            keys,
            values,
            segment_ids=segment_ids,
            window=window,
            scale=scale,
            softcap=softcap,
            block=form.block,
        )
    if name == "cudnn":
        kernel = partial(cudnn, segmented=segment_ids is not None, window=window, scale=scale)
    else:
        kernel = partial(
            splash, window=window, scale=scale, softcap=softcap, interpret=form.interpret
        )
    if segment_ids is None:
        segment_ids = jnp.zeros(query.shape[:2], jnp.int32)
    return run_over_mesh(kernel, form, query, keys, values, segment_ids)
