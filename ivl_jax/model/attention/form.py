"""Which form attention takes, decided from the devices before anything is traced.

In: the configured form, the mesh's devices, dtype and architecture. Out: `AttentionForm`, static
and hashable, part of a decoder's graphdef. The process's own backend plays no part, so that
programs can be compiled for machines that are not attached.

    splash   TPU: Pallas' splash attention kernel
    cudnn    GPU from compute capability 8.0, 16-bit floats: cuDNN through JAX
    blocked  everything else: XLA operations, a block of queries at a time
    plain    short rows, and every call that reads a cache: all scores at once
"""

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ivl_jax.model.architecture import ArchConfig

logger = logging.getLogger(__name__)

FormName = Literal["plain", "blocked", "splash", "cudnn"]
# On CPU (2 rows, 8 heads of 64, gradients) blocks take 1.2 to 1.7 × the plain form's time at 1,024
# tokens and 0.9 × at 2,048.
SHORT_ROW = 1024
_SHORTEST_KERNEL_ROW = 128  # tokens; the kernels' tiles are as long
_CUDNN_WIDEST_HEAD = 128
_CUDNN_CAPABILITY = 8.0  # Ampere; before it there is no bfloat16 and no flash kernel


@runtime_checkable
class DeviceInfo(Protocol):
    """What is asked of a `jax.Device`, or of a device in a topology that is not here."""

    @property
    def platform(self) -> str:
        """Its backend: cpu, gpu or tpu."""
        ...

    @property
    def device_kind(self) -> str:
        """Its model, as its maker names it."""
        ...


@dataclass(frozen=True)
class AttentionForm:
    """How attention over a call's own keys is computed, and how caches are written.

    All forms compute the same function.
    """

    name: FormName = "plain"
    longest_plain: int = 0
    """Rows of at most this many tokens take the plain form whatever the name."""
    mesh: Mesh | None = None
    """Mesh on which kernels run, each device on its own rows and heads; None: one device."""
    batch_axes: tuple[str, ...] = ()
    """Mesh axes that split rows."""
    head_axis: str | None = None
    """Mesh axis that splits heads."""
    block: int = 256
    """Queries per block in the blocked form."""
    interpret: bool = False
    """Interpret Pallas kernels operation by operation, for tests without a TPU."""
    writes_by_head: bool = False
    """How a cache is written: see `cache_writes.write_slots`."""

    def at_length(self, length: int) -> FormName:
        """The form for rows of this many tokens."""
        if length <= self.longest_plain:
            return "plain"
        if self.name == "cudnn" and length % 2:  # no gradient for odd lengths
            return "blocked"
        return self.name


PLAIN = AttentionForm()


def choose_form(
    wanted: Literal["auto"] | FormName,
    arch: ArchConfig,
    *,
    dtype: DTypeLike,
    devices: Sequence[DeviceInfo],
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
) -> AttentionForm:
    """Choose a form, and log once which one and why (on a CPU only where it is configured).

    Args:
        wanted: `auto`, or the form to use.
        arch: Gives head width and soft cap.
        dtype: Of queries, keys and values.
        devices: Where it will run; they need not be attached.
        mesh: The mesh they form; None: one device.
        batch_axes: Mesh axes that split rows.
        head_axis: Mesh axis that splits heads.

    Returns:
        The form.

    Raises:
        ValueError: The devices, the dtype or the architecture do not support the form asked for;
            names the reason and the alternatives.
    """
    device = devices[0]
    obstacle = {"splash": _no_splash(device), "cudnn": _no_cudnn(device, arch, dtype)}
    if wanted != "auto":
        if reason := obstacle.get(wanted):
            raise ValueError(
                f"attention = {wanted!r}: {reason}; use 'auto' or 'blocked', which runs everywhere"
            )
        name, why = wanted, "as configured"
    elif device.platform == "tpu":
        name, why = "splash", "rows on a TPU"
    elif device.platform in ("gpu", "cuda", "rocm"):
        name = "blocked" if obstacle["cudnn"] else "cudnn"
        why = obstacle["cudnn"] or "16-bit floats on a GPU"
    else:
        name, why = "blocked", f"rows of more than {SHORT_ROW} tokens on {device.platform}"
    longest_plain = 0
    if wanted == "auto":
        longest_plain = SHORT_ROW if name == "blocked" else _SHORTEST_KERNEL_ROW - 1
    if wanted != "auto" or device.platform != "cpu":
        _say(name, why, device.device_kind)
    return AttentionForm(
        name,
        longest_plain,
        mesh,
        batch_axes,
        head_axis,
        writes_by_head=device.platform != "cpu",
    )


@functools.cache
def _say(name: str, why: str, device_kind: str) -> None:
    logger.info("attention: the %s form on %s (%s)", name, device_kind, why)


def _no_splash(device: DeviceInfo) -> str | None:
    """Why splash attention cannot run there."""
    if device.platform != "tpu":
        return f"the kernel is for TPUs, and these are {device.device_kind}"
    return None


def _no_cudnn(device: DeviceInfo, arch: ArchConfig, dtype: DTypeLike) -> str | None:
    """Why cuDNN's attention cannot run there."""
    if device.platform not in ("gpu", "cuda"):
        return f"cuDNN is for NVIDIA GPUs, and these are {device.device_kind}"
    named = str(getattr(device, "compute_capability", "0"))
    if not re.fullmatch(r"\d+(\.\d+)?", named):  # AMD's are named gfx942
        return f"cuDNN is for NVIDIA GPUs, and these are {device.device_kind} ({named})"
    capability = float(named)
    if capability < _CUDNN_CAPABILITY:
        return f"cuDNN's kernel needs compute capability {_CUDNN_CAPABILITY}, found {capability}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's kernel needs 16-bit floats, found {jnp.dtype(dtype)}"
    if arch.head_dim % 8 or arch.head_dim > _CUDNN_WIDEST_HEAD:
        return (
            f"cuDNN's kernel needs heads of at most {_CUDNN_WIDEST_HEAD} numbers, a multiple of 8, "
            f"found {arch.head_dim}"
        )
    if arch.attn_logit_softcapping is not None:
        return "cuDNN's kernel has no soft cap"
    return None
