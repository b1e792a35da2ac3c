"""Splash attention: JAX's own Pallas kernel for TPUs, which never writes scores to memory.

In: queries, keys and values of one device. Out: the attended values; the gradient is a kernel too.
Blocks of keys that no query of a block sees are skipped: later ones, and those before a window.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from ivl_jax.model.remat import KEPT

_TILE = 128  # block lengths are multiples of this
_LARGEST_BLOCK = 512
_PADDING = -1  # a segment of its own


def splash(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention over this call's own keys, on one device.

    Rows are padded to whole blocks; padding comes after every query and is in no query's segment.

    Args:
        query: Rotated queries; scaled here, in their own dtype.
        keys: Rotated keys, heads first.
        values: Values, heads first.
        segment_ids: Queries see keys of their own segment only.
        window: The most keys that a query sees, its own included; None: no limit.
        scale: Factor on the scores.
        softcap: Scores become c·tanh(score / c); None: no cap.
        interpret: Run without a TPU, operation by operation.

    Returns:
        The attended values in the query's dtype.
    """
    length, heads = query.shape[1:3]
    block = _block(length)
    whole = -(-length // block) * block
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype).swapaxes(1, 2)
    queries, padded_keys, padded_values = (
        jnp.pad(array, [(0, 0), (0, 0), (0, whole - length), (0, 0)])
        for array in (scaled, keys, values)
    )
    segments = jnp.pad(
        segment_ids.astype(jnp.int32), [(0, 0), (0, whole - length)], constant_values=_PADDING
    )
    mask: splash_attention.Mask = splash_attention.CausalMask((whole, whole))
    if window is not None:
        mask = splash_attention.LocalMask((whole, whole), window_size=(window - 1, 0), offset=0)
    # The kernel mixes dtypes, which strict promotion forbids. It is made anew in every trace, since
    # its block tables are arrays of that trace.
    with jax.numpy_dtype_promotion("standard"):
        kernel = splash_attention.make_splash_mha_single_device(
            mask=splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(block),
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )

        def one_row(query: Array, keys: Array, values: Array, own: Array) -> Array:
            mixed = kernel(query, keys, values, splash_attention.SegmentIds(own, own))
            assert isinstance(mixed, Array)  # a tuple only where residuals are asked for
            return mixed

        mixed = jax.vmap(one_row)(queries, padded_keys, padded_values, segments)
    return mixed.swapaxes(1, 2)[:, :length].astype(query.dtype)


def _block(length: int) -> int:
    """The largest block that pads a row by less than one tile more than it must."""
    tiles = -(-length // _TILE)
    for size in range(_LARGEST_BLOCK // _TILE, 0, -1):
        if tiles % size == 0:
            return size * _TILE
    return _TILE


def _block_sizes(block: int) -> splash_attention.BlockSizes:
    return splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
