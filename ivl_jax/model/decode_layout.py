"""The form of a decoder's parameters that is read fastest for a few tokens at a time on CPU.

In: parameters as they are trained, kernels (in, out). Out: the same decoder with kernels (out, in),
and one kernel where several projections have one input; `build_decoder(…, form=KernelForm(rows=
True))` computes with it.
"""

import jax.numpy as jnp

from ivl_jax.model.decoder import Params

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections of one input, which decoding fuses: name → those whose rows it has, in order."""


def to_decode_layout(params: Params) -> Params:
    """Lay a decoder's parameters out for decoding, once.

    Args:
        params: Layers unstacked, kernels (in, out), in float or int8; they are left as they are.

    Returns:
        Each layer's `qkv_proj` and `gate_up_proj` in place of q, k, v, gate and up; every kernel
        (out, in). Embedding and norms are the same arrays; a tied head is the embedding itself,
        which has this form already.
    """
    layers = {index: _layer(layer) for index, layer in params["layers"].items()}
    head = {"lm_head": _as_rows(params["lm_head"])} if "lm_head" in params else {}
    return params | {"layers": layers} | head


def _layer(layer: Params) -> Params:
    return {name: part if "layernorm" in name else _fuse(part) for name, part in layer.items()}


def _fuse(module: Params) -> Params:
    """A module's projections, those of one input fused; norms stay."""
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
    """One projection whose kernel has the output features of all as rows."""
    parts = {name: [part[name] for part in projections] for name in projections[0]}
    parts["kernel"] = [kernel.T for kernel in parts["kernel"]]
    return {name: jnp.concatenate(arrays) for name, arrays in parts.items()}
