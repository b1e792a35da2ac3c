"""What layers keep for the backward pass, and what they compute again.

In: one layer as a pure function, and a policy. Out: the same function, rematerialised.

    none   everything but masks is kept: the most memory, hardly anything is computed twice
    full   the residual stream before each layer; its whole forward pass is computed again
    dots   also the results of its projections and of attention; norms, rotations, activations and,
           in attention forms without a result to keep, attention are computed again

Values are kept by name, not by operation: a product that is rounded to the compute dtype is kept
after rounding, at half the size.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

Remat = Literal["none", "full", "dots"]

KEPT = "kept by dots"
"""The name of values that `dots` keeps."""


def _all_but_masks(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Keep everything but booleans that were picked or broadcast from other booleans.

    A scan would stack every layer's own copy of the mask, for each head.
    """
    del primitive, parameters
    dtypes = [getattr(value, "dtype", None) for value in inputs]
    of_mask = bool(dtypes) and dtypes[0] == jnp.bool_
    return not of_mask or any(dtype == jnp.float32 for dtype in dtypes)


_POLICIES: dict[str, Any] = {
    "none": _all_but_masks,
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
}
_Layer = Callable[..., Any]


def keep(x: Array) -> Array:
    """Mark a value as one that `dots` keeps; changes nothing else."""
    return checkpoint_name(x, KEPT)


def rematerialised(
    layer: _Layer, remat: Remat, *, scanned: bool, static_argnums: tuple[int, ...] = ()
) -> _Layer:
    """Apply a policy to one layer.

    Args:
        layer: A pure function.
        remat: The policy.
        scanned: Whether it is the body of a scan, in which XLA cannot merge the forward and the
            recomputed pass anyway.
        static_argnums: Arguments that are not arrays.

    Returns:
        A function with the same values and gradients.
    """
    if remat == "none" and not scanned:
        return layer
    return jax.checkpoint(
        layer,
        policy=_POLICIES[remat],
        prevent_cse=not scanned,
        static_argnums=static_argnums,
    )
