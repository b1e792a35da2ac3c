"""The form of a decoder's parameters that decodes fastest on CPU.

In: parameters as trained, kernels (in, out). Out: the same decoder with kernels (out, in), and one
fused kernel for projections of the same input; `build_decoder(…, form=KernelForm(rows=True))`
computes with it.
"""

import jax.numpy as jnp

from ivl_jax.model.decoder import Params

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections of the same input, fused for decoding: fused name → its parts, in row order."""


def to_decode_layout(params: Params) -> Params:
    """Arrange a decoder's parameters for decoding, once.

    Args:
        params: Layers unstacked, kernels (in, out), in float or int8; not modified.

    Returns:
        Each layer's `qkv_proj` and `gate_up_proj` in place of q, k, v, gate and up; every kernel
        (out, in). Embedding and norms are the same arrays; a tied head is the embedding, which
        already has this form.
    """
    layers = {index: _layer(layer) for index, layer in params["layers"].items()}
    head = {"lm_head": _as_rows(params["lm_head"])} if "lm_head" in params else {}
    return params | {"layers": layers} | head


def _layer(layer: Params) -> Params:
    return {name: part if "layernorm" in name else _fuse(part) for name, part in layer.items()}


def _fuse(module: Params) -> Params:
    """A module's projections, fused where they have the same input; norms are unchanged."""
    fused_parts = {part for parts in FUSED.values() for part in parts}
    alone = {
        name: _as_rows(part) if "kernel" in part else part
        for name, part in module.items()
        if name not in fused_parts
    }
    fused = {
        name: _as_rows(*(module[part] for part in parts))
        for name, parts in FUSED.items()
        if parts[0] in module
    }
    return alone | fused


def _as_rows(*projections: Params) -> Params:
    """One projection whose kernel has the output features of all of them as rows."""
    parts = {name: [part[name] for part in projections] for name in projections[0]}
    parts["kernel"] = [kernel.T for kernel in parts["kernel"]]
    return {name: jnp.concatenate(arrays) for name, arrays in parts.items()}
