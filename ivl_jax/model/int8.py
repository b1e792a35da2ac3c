"""Int8 kernels: a quarter of a frozen network's memory, and of what decoding has to read.

In: parameters in float. Out: the same with int8 kernels and one float32 scale per output feature,
for `build_decoder(…, form=KernelForm(int8=True))`. Embeddings, norms and biases are unchanged.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ivl_jax.model.decoder import ADDITIONS, Params

_LARGEST = 127.0


def quantize(params: dict[Any, Any], *, rows: bool) -> dict[Any, Any]:
    """Round every kernel to int8, symmetrically, each output feature by its largest weight.

    Args:
        params: Of a decoder, layers unstacked or stacked; not modified. Kernels already in int8 and
            the modules that only value networks have are kept. A tied head is the embedding and
            stays a float.
        rows: Kernels are (out, in), as `to_decode_layout` returns them.

    Returns:
        The parameters, with `{"kernel": int8, "scale": float32}` for each `{"kernel": float}`. The
        error per weight is at most half the scale.
    """
    if "kernel" in params:
        given = "scale" in params
        return params if given else params | _quantized(params["kernel"], axis=-1 if rows else -2)
    return {
        name: quantize(part, rows=rows)
        if isinstance(part, dict) and name not in ADDITIONS
        else part
        for name, part in params.items()
    }


def without_scales(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Remove the scales: the tree that the parameters had before `quantize`."""
    return {
        name: without_scales(part) if isinstance(part, dict) else part
        for name, part in tree.items()
        if not (name == "scale" and "kernel" in tree)
    }


def _quantized(kernel: Float[Array, "*L _ _"], *, axis: int) -> Params:
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    rounded = jnp.round(wide / scale).astype(jnp.int8)
    return {"kernel": rounded, "scale": jnp.squeeze(scale, axis)}
