"""Low-rank adapters: the trained parameters of a network whose other parameters are frozen.

    x @ W  becomes  x @ (W + alpha / rank · A @ B)

In: an architecture and a `Lora`. Out: the adapter as a tree of its own (shapes, initial values),
joined with the frozen parameters for `build_decoder(…, form=KernelForm(lora=…))`, or merged into
them for a decoder without adapters. B is zero at first, so that the network begins as it was.

Source: Hu et al., LoRA, arXiv 2106.09685. A is initialised as in Hugging Face's PEFT, so that
published learning rates apply.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import Params, abstract_params
from ivl_jax.model.decoder import stack_layers
from ivl_jax.model.projection import KernelForm, Lora


def frozen_arch(arch: ArchConfig) -> ArchConfig:
    """The architecture of the frozen model: without what only a value network has."""
    return arch.plain


def adapter_shapes(arch: ArchConfig, lora: Lora, *, scan_layers: bool = False) -> Params:
    """Shapes of an adapter's parameters, as float32 `jax.ShapeDtypeStruct`s.

    Args:
        arch: Of the whole network.
        lora: Which kernels have an adapter.
        scan_layers: Stack the layers.

    Returns:
        What the network has and the frozen model has not: `lora_a` and `lora_b` of each kernel; and
        the modules that only value networks have.
    """
    whole = abstract_params(arch, scan_layers=scan_layers, form=KernelForm(lora=lora))
    return without(whole, abstract_params(frozen_arch(arch), scan_layers=scan_layers))


def init_adapter(
    arch: ArchConfig, lora: Lora, key: Key[Array, ""], *, scan_layers: bool = False
) -> Params:
    """Initial parameters of an adapter: A uniform in ±1 / √(input size), everything else zero.

    Args:
        arch: Of the whole network.
        lora: Which kernels have an adapter.
        key: A typed PRNG key; equal keys give equal parameters whatever `scan_layers` is.
        scan_layers: Stack the layers.

    Returns:
        Float32 arrays in the shapes of `adapter_shapes`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(adapter_shapes(arch, lora))
    keys = jax.random.split(key, len(leaves))

    def fill(path: Any, leaf: jax.ShapeDtypeStruct, key: Key[Array, ""]) -> Array:
        if path[-1].key != "lora_a":
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = leaf.shape[0] ** -0.5
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    filled = [fill(path, leaf, keys[index]) for index, (path, leaf) in enumerate(leaves)]
    adapter = jax.tree.unflatten(structure, filled)
    return stack_layers(adapter) if scan_layers else adapter


def join(adapter: Params, frozen: Params) -> Params:
    """All parameters of a network, from those of its adapter and of its frozen model.

    Args:
        adapter: Trained parameters.
        frozen: Frozen parameters, at other paths; layers stacked like the adapter's.

    Returns:
        The parameters of a decoder whose form has a `lora`.

    Example:
        >>> join({"q_proj": {"lora_a": 1, "lora_b": 2}}, {"q_proj": {"kernel": 3}})
        {'q_proj': {'kernel': 3, 'lora_a': 1, 'lora_b': 2}}
    """
    both = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(adapter)
    return traverse_util.unflatten_dict(both)


def without(params: Params, others: Params) -> Params:
    """The parameters at those paths that another tree does not have.

    Example:
        >>> without({"q_proj": {"kernel": 3, "lora_a": 1}}, {"q_proj": {"kernel": 0}})
        {'q_proj': {'lora_a': 1}}
    """
    absent = traverse_util.flatten_dict(others).keys()
    flat = traverse_util.flatten_dict(params).items()
    return traverse_util.unflatten_dict({path: x for path, x in flat if path not in absent})


def merge(joined: dict[Any, Any], lora: Lora, *, dtype: DTypeLike) -> dict[Any, Any]:
    """The parameters of an equal network without adapters.

    Args:
        joined: From `join`, or a part of it; layers stacked or not.
        lora: Of its adapters.
        dtype: Of the result; the sum W + alpha / rank · A @ B is computed in float32.

    Returns:
        The parameters, without `lora_a` and `lora_b`; every kernel is a float.
    """
    if "kernel" in joined:
        joined = _merged(lora, **joined)
    return {
        name: merge(part, lora, dtype=dtype) if isinstance(part, dict) else part.astype(dtype)
        for name, part in joined.items()
    }


def _merged(
    lora: Lora,
    *,
    kernel: Array,
    scale: Array | None = None,
    lora_a: Array | None = None,
    lora_b: Array | None = None,
    **others: Array,
) -> Params:
    """The parameters of one projection, its kernel [*L I O] in float32."""
    kernel = kernel.astype(jnp.float32)
    if scale is not None:
        kernel = kernel * scale[..., None, :]
    if lora_a is not None and lora_b is not None:
        kernel = kernel + lora.scale * jnp.matmul(lora_a, lora_b, precision="highest")
    return {"kernel": kernel, **others}
