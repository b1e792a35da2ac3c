"""The form of a decoder's parameters that is read fastest for a few tokens at a time on CPU.

In: parameters as they are trained, kernels (in, out). Out: the same decoder with kernels (out, in),
and one kernel where several projections have one input; `build_decoder(…, form=KernelForm(rows=
True))` computes with it.
"""

import jax.numpy as jnp

from ivl_jax.model.decoder import Params


def to_decode_layout(params: Params) -> Params:
    """Lay a decoder's parameters out for decoding, once.

    Args:
        params: Layers unstacked; they are left as they are.

    Returns:
        Each layer's `qkv_proj` and `gate_up_proj` in place of q, k, v, gate and up; every kernel
        (out, in). Embedding and norms are the same arrays; a tied head is the embedding itself,
        which has this form already.
    """
    layers = {index: _layer(layer) for index, layer in params["layers"].items()}
    head = {"lm_head": _as_rows(params["lm_head"])} if "lm_head" in params else {}
    return params | {"layers": layers} | head


def _layer(layer: Params) -> Params:
    attention, mlp = dict(layer["self_attn"]), layer["mlp"]
    parts = [attention.pop(name) for name in ("q_proj", "k_proj", "v_proj")]
    attention |= {"qkv_proj": _as_rows(*parts), "o_proj": _as_rows(attention["o_proj"])}
    mlp = {
        "gate_up_proj": _as_rows(mlp["gate_proj"], mlp["up_proj"]),
        "down_proj": _as_rows(mlp["down_proj"]),
    }
    return layer | {"self_attn": attention, "mlp": mlp}


def _as_rows(*projections: Params) -> Params:
    """One projection whose kernel has the output features of all as rows."""
    fused = {"kernel": jnp.concatenate([part["kernel"].T for part in projections])}
    if "bias" in projections[0]:
        fused["bias"] = jnp.concatenate([part["bias"] for part in projections])
    return fused
