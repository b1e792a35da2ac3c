"""The form in which a network's parameters are stored for decoding, decided once, at loading.

In: parameters as they were loaded, layers unstacked. Out: a graphdef and parameters in the form
that this device reads fastest one token at a time, or sharded over a mesh.

    one CPU device   (out, in) kernels, q·k·v and gate·up fused; a tied head is the embedding
    anything else    (in, out) kernels as in training, which shard by one table; untied head
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from ivl_jax.composed.attention import attention_on_device, attention_on_mesh
from ivl_jax.composed.network import Layout
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decode_layout import to_decode_layout
from ivl_jax.model.decoder import Params, untie_head
from ivl_jax.model.int8 import quantize
from ivl_jax.model.network import Architecture, abstract_network, build_network
from ivl_jax.model.projection import AS_TRAINED, KernelForm
from ivl_jax.sharding import VOCABULARY_ROW_MULTIPLE, padded_vocab_rows, parameter_shardings


def lay_out_network(
    params: Params,
    arch: Architecture,
    layout: Layout | None,
    *,
    int8: bool = False,
    compute_dtype: DTypeLike | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """Arrange a network for decoding.

    Args:
        params: layers unstacked, as loaded or as returned by this function; not modified.
        arch: their architecture.
        layout: how to place them on a mesh; None: they stay where they are, on one device.
        int8: round the kernels to int8, including the head; kernels that are already in int8 stay
            as they are in any case.
        compute_dtype: of activations and products; None: that of the parameters.

    Returns:
        The static half of the network, and its parameters.
        Layers stay unstacked everywhere: with a scan, a step of 134 M + 24 M parameters takes 1.6
        times as long on CPU.

    Raises:
        ValueError: the parameters are already arranged for one CPU device, but a mesh is given.
    """
    head = params["lm_head"]["kernel"] if "lm_head" in params else _embedding(params)
    given = _form_of(params)
    if given.rows and layout is not None:
        raise ValueError(
            "a network arranged for decoding on one CPU device cannot be placed on a mesh: "
            "compose the model as it was loaded"
        )
    rows = layout is None and isinstance(arch, ArchConfig) and _on_cpu(head)
    form = KernelForm(rows=rows, int8=int8 or given.int8)
    dtype = compute_dtype or (_embedding(params).dtype if given.int8 else head.dtype)
    if layout is None:
        attention = attention_on_device(arch, next(iter(head.devices())), dtype=dtype)
    else:
        attention = attention_on_mesh(arch, layout, dtype=dtype)
    graphdef = build_network(arch, compute_dtype=dtype, form=form, attention=attention)
    if not given.rows:
        params = to_decode_layout(params) if rows else untie_head(params)
    if int8:
        if "lm_head" not in params:
            params = params | {"lm_head": {"kernel": _embedding(params)}}
        if rows:
            params = params | {"lm_head": _with_even_rows(params["lm_head"])}
        params = quantize(params, rows=rows)
    if layout is None:
        return graphdef, params
    return graphdef, jax.device_put(params, _shardings(params, arch, layout))


def network_shapes(
    arch: Architecture,
    layout: Layout,
    *,
    dtype: DTypeLike,
    int8: bool = False,
    int8_tied_head: bool = True,
    compute_dtype: DTypeLike | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """What `lay_out_network` returns for a network on a mesh, as shapes: no weights are needed.

    Args:
        arch: its architecture.
        layout: where it would decode; the devices need not be attached.
        dtype: of its parameters.
        int8: its kernels are rounded to int8, including the head.
        int8_tied_head: with `int8`, also a head that is tied to the embedding.
        compute_dtype: as `lay_out_network` takes it.

    Returns:
        The static half of the network, and `jax.ShapeDtypeStruct`s with shardings.
    """
    computed = compute_dtype or dtype
    attention = attention_on_mesh(arch, layout, dtype=computed)
    form = KernelForm(int8=int8)
    graphdef = build_network(arch, compute_dtype=computed, form=form, attention=attention)
    rows = padded_vocab_rows(arch.vocab_size, layout.mesh, layout.rules)

    def arranged(params: Params) -> Params:
        if not int8:
            return untie_head(params)
        if int8_tied_head:
            return quantize(untie_head(params), rows=False)
        return untie_head(quantize(params, rows=False))

    as_loaded = abstract_network(arch, param_dtype=dtype, vocab_rows=rows)
    params = jax.eval_shape(arranged, as_loaded)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        _shardings(params, arch, layout),
    )
    return graphdef, shapes


def loading_form(mesh: Mesh | None, *, int8: bool = False) -> KernelForm:
    """The form in which to load a network that only decodes, so that each weight is held once.

    Args:
        mesh: where it will decode; None: one device.
        int8: whether its kernels will be in int8.

    Returns:
        The form, for `load_language_model`; `lay_out_network` leaves kernels of this form alone.
    """
    return KernelForm(rows=mesh is None and jax.default_backend() == "cpu", int8=int8)


def output_rows(params: Params) -> int:
    """Number of logit columns, padding included, of parameters in either form."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"].shape[0 if _form_of(params).rows else 1]
    return _embedding(params).shape[0]


def _shardings(params: Params, arch: Architecture, layout: Layout) -> Params:
    units = {"heads": arch.num_attention_heads, "kv_heads": arch.num_key_value_heads}
    return parameter_shardings(params, layout.mesh, layout.rules, units=units)


def _form_of(params: Params) -> KernelForm:
    """The form of these parameters: as loaded, or as arranged for a composed model."""
    layers = params.get("layers", {})
    if 0 not in layers:
        return AS_TRAINED
    return KernelForm(
        rows="qkv_proj" in layers[0]["self_attn"], int8="scale" in layers[0]["mlp"]["down_proj"]
    )


def _with_even_rows(head: Params) -> Params:
    """A head [V D] padded with zero rows, so that the rows form large tiles (`projection`).

    32,001 rows would be 10,667 tiles of 3; composition masks the padding columns.
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
