"""How a network's parameters lie while it decodes, decided once, when it is loaded.

In: parameters as they were loaded, layers unstacked. Out: a graphdef and parameters in the form
that this device reads fastest a token at a time, or split over a mesh.

    one CPU device   (out, in) kernels, q·k·v and gate·up fused; a tied head is the embedding
    anything else    (in, out) kernels as in training, which shard by one table; head untied
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from ivl_jax.composed.network import Layout
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decode_layout import to_decode_layout
from ivl_jax.model.decoder import Params, untie_head
from ivl_jax.model.int8 import quantize
from ivl_jax.model.network import Architecture, build_network
from ivl_jax.model.projection import AS_TRAINED, KernelForm
from ivl_jax.sharding import VOCABULARY_ROW_MULTIPLE, parameter_shardings


def lay_out_network(
    params: Params, arch: Architecture, layout: Layout | None, *, int8: bool = False
) -> tuple[nnx.GraphDef, Params]:
    """Arrange a network for decoding.

    Args:
        params: layers unstacked, as loaded or as this function has laid them out; left as they are.
        arch: their architecture.
        layout: where they are to lie on a mesh; None: where they are, on one device.
        int8: round the kernels to int8, the head among them.

    Returns:
        The static half of the network, which computes in the parameters' dtype, and parameters for
        it. Layers stay unstacked everywhere: scanned, a step of 134 M + 24 M parameters takes 1.6
        times as long on CPU.

    Raises:
        ValueError: laid out for one CPU device already, and wanted on a mesh.
    """
    head = params["lm_head"]["kernel"] if "lm_head" in params else _embedding(params)
    given = _form_of(params)
    if given.rows and layout is not None:
        raise ValueError(
            "a network that is laid out for decoding on one CPU device cannot go onto a mesh: "
            "compose the model as it was loaded"
        )
    rows = layout is None and isinstance(arch, ArchConfig) and _on_cpu(head)
    form = KernelForm(rows=rows, int8=int8 or given.int8)
    dtype = _embedding(params).dtype if given.int8 else head.dtype
    graphdef = build_network(arch, compute_dtype=dtype, form=form)
    if not given.rows:
        params = to_decode_layout(params) if rows else untie_head(params)
    if form.int8:
        if "lm_head" not in params:
            params = params | {"lm_head": {"kernel": _embedding(params)}}
        if rows:
            params = params | {"lm_head": _with_even_rows(params["lm_head"])}
        params = quantize(params, rows=rows)
    if layout is None:
        return graphdef, params
    units = {"heads": arch.num_attention_heads, "kv_heads": arch.num_key_value_heads}
    shardings = parameter_shardings(params, layout.mesh, layout.rules, units=units)
    return graphdef, jax.device_put(params, shardings)


def loading_form(mesh: Mesh | None, *, int8: bool = False) -> KernelForm:
    """The form in which to load a network that is only to decode: then each weight is held once.

    Args:
        mesh: where it will decode; None: one device.
        int8: its kernels are to be in int8.

    Returns:
        The form, for `load_language_model`; `lay_out_network` leaves such kernels as they are.
    """
    return KernelForm(rows=mesh is None and jax.default_backend() == "cpu", int8=int8)


def output_rows(params: Params) -> int:
    """Columns of the logits, padding included, of parameters as loaded or as laid out."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"].shape[0 if _form_of(params).rows else 1]
    return _embedding(params).shape[0]


def _form_of(params: Params) -> KernelForm:
    """The form in which parameters come: as loaded, or as a composed model has laid them out."""
    layers = params.get("layers", {})
    if 0 not in layers:
        return AS_TRAINED
    return KernelForm(
        rows="qkv_proj" in layers[0]["self_attn"], int8="scale" in layers[0]["mlp"]["down_proj"]
    )


def _with_even_rows(head: Params) -> Params:
    """A head [V D] whose rows make large tiles (`projection`), with empty ones after its own.

    32,001 rows would be 10,667 tiles of 3; composition masks the columns that are no token.
    """
    more = -head["kernel"].shape[0] % VOCABULARY_ROW_MULTIPLE
    if not more:
        return head
    return {
        name: jnp.pad(part, ((0, more), *[(0, 0)] * (part.ndim - 1))) for name, part in head.items()
    }


def _embedding(params: Params) -> Array:
    return params["embed_tokens"]["embedding"]


def _on_cpu(array: Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())
