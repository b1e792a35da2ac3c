"""Lets cuDNN's attention be traced and lowered for a GPU that is not attached.

In: a compute capability. Out: a context in which JAX takes it for that of the GPU at hand.
`jax.nn.dot_product_attention(implementation="cudnn")` asks three functions of
`jax._src.cudnn.fused_attention_stablehlo` about the live backend: for cuDNN's version, and whether
the first GPU's compute capability is at least, or exactly, a given one. Only these are replaced.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from jax._src.cudnn import fused_attention_stablehlo

from ivl_jax.plan.gpu_chips import cudnn_version

_ASKED = ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal")


class ChangedJaxError(RuntimeError):
    """This version of JAX asks for cuDNN in another way."""


@contextlib.contextmanager
def cudnn_for(capability: tuple[int, int]) -> Iterator[None]:
    """Answer JAX's questions about cuDNN for a GPU that is not attached.

    Args:
        capability: compute capability of the GPU.

    Raises:
        ChangedJaxError: this version of JAX asks other functions.
    """
    asked: ModuleType = fused_attention_stablehlo
    missing = [name for name in _ASKED if not callable(getattr(asked, name, None))]
    if missing:
        raise ChangedJaxError(
            f"{asked.__name__} has no {', '.join(missing)}: this version of JAX asks for cuDNN in "
            "another way; plan for GPUs with --model.attention blocked, or with an earlier JAX"
        )
    answers: dict[str, Any] = {
        "check_cudnn_version": cudnn_version,
        "check_compute_capability": lambda least: capability >= _parsed(least),
        "is_cuda_compute_capability_equal": lambda other: capability == _parsed(other),
    }
    own = {name: getattr(asked, name) for name in _ASKED}
    try:
        for name, answer in answers.items():
            setattr(asked, name, answer)
        yield
    finally:
        for name, function in own.items():
            setattr(asked, name, function)


def _parsed(capability: str) -> tuple[int, ...]:
    """`9.0` as (9, 0)."""
    return tuple(int(part) for part in capability.split("."))
