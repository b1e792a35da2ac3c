"""Which form of attention a network uses on its mesh or device.

In: an architecture, a dtype, a layout on a mesh or a device. Out: the form, for `build_network`.
"""

import jax
from jax.typing import DTypeLike

from ivl_jax.composed.network import Layout
from ivl_jax.config import AttentionName
from ivl_jax.model.attention.form import PLAIN, AttentionForm, choose_form
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import Architecture
from ivl_jax.sharding import BATCH_AXES


def attention_on_mesh(
    arch: Architecture, layout: Layout, *, dtype: DTypeLike, wanted: AttentionName = "auto"
) -> AttentionForm:
    """Choose for a network on a mesh, whose devices need not be attached.

    Args:
        arch: Its architecture; a linear map has no attention.
        layout: How it is sharded: rows over data and fsdp, heads as its parameters.
        dtype: The compute dtype.
        wanted: The form to use, or `auto`.

    Returns:
        The form.

    Raises:
        ValueError: As `choose_form`.
    """
    if isinstance(arch, LinearMapConfig):
        return PLAIN
    heads = layout.rules.heads
    return choose_form(
        wanted,
        arch,
        dtype=dtype,
        devices=layout.mesh.devices.flatten().tolist(),
        mesh=layout.mesh,
        batch_axes=BATCH_AXES,
        head_axis=None if heads in BATCH_AXES else heads,
    )


def attention_on_device(
    arch: Architecture, device: jax.Device, *, dtype: DTypeLike
) -> AttentionForm:
    """Choose for a network on one device; arguments as in `attention_on_mesh`."""
    if isinstance(arch, LinearMapConfig):
        return PLAIN
    return choose_form("auto", arch, dtype=dtype, devices=[device])
