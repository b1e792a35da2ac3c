"""Parameters, each declared once: shape, logical axes, initial values, Hugging Face tensor.

In: a module whose parameters were made by `declare`. Out: their declarations by path, their
abstract tree, the module's static half. Initialisation, sharding, loading and saving derive from
these; parameters are listed nowhere else.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.typing import DTypeLike

ParamPath = tuple[str | int, ...]
"""Keys of a parameter in the nested dict: `("layers", 0, "mlp", "up_proj", "kernel")`."""
Axis = tuple[str | None, int]
"""Logical name and size of a dimension; a dimension without a name is never split over devices."""
Initial = Literal["normal", "zeros", "ones"]


class Fused(NamedTuple):
    """Where a parameter is stored within a larger tensor of a Hugging Face file."""

    module: str  # replaces the parameter's own module in the name: qkv_proj
    start: int  # the parameter's first row


class Declaration(NamedTuple):
    """What is known about a parameter before it has values, except its shape."""

    axes: tuple[str | None, ...]  # logical name of each dimension
    initial: Initial  # initial values
    dtype: jnp.dtype | None  # None: the common dtype of all parameters
    hf_suffix: str | None  # last part of its tensor's name: weight, bias; None: not in files
    transposed: bool  # the file's tensor has its two dimensions swapped
    fused_in: Fused | None  # in files, its tensor is part of another module's


def declare(
    *axes: Axis,
    initial: Initial = "normal",
    dtype: DTypeLike | None = None,
    hf_suffix: str | None = "weight",
    transposed: bool = False,
    fused_in: Fused | None = None,
) -> nnx.Param:
    """Declare a parameter; `nnx.merge` supplies its values.

    Args:
        *axes: Logical name and size of each dimension.
        initial: Initial values: `normal`, with the architecture's standard deviation, `zeros` or
            `ones`.
        dtype: The dtype it is always stored in; None: that of the other parameters.
        hf_suffix: Last part of its tensor's name in a Hugging Face file, after the module's path;
            None: not in files.
        transposed: Whether the file has (out, in) and the parameter (in, out).
        fused_in: The larger tensor of the file that contains the parameter's rows; None: a tensor
            of its own.

    Returns:
        The parameter, with its shape in place of values.
    """
    fixed = None if dtype is None else jnp.dtype(dtype)
    shape = jax.ShapeDtypeStruct(tuple(size for _, size in axes), fixed or jnp.float32)
    names = tuple(name for name, _ in axes)
    declaration = Declaration(names, initial, fixed, hf_suffix, transposed, fused_in)
    return nnx.Param(shape, declaration=declaration)


def declarations(module: nnx.Module) -> dict[ParamPath, Declaration]:
    """Path → declaration of every parameter of a module."""
    return {path: param.get_metadata("declaration") for path, param in _parameters(module)}


def abstract_tree(module: nnx.Module, param_dtype: DTypeLike) -> dict[Any, Any]:
    """Shape and dtype of every parameter of a module, as a nested dict; allocates nothing."""
    leaves = {
        path: jax.ShapeDtypeStruct(
            param.shape, param.get_metadata("declaration").dtype or param_dtype
        )
        for path, param in _parameters(module)
    }
    return traverse_util.unflatten_dict(leaves)


def static_half(module: nnx.Module) -> nnx.GraphDef:
    """The graphdef of a module, without declarations, since it is hashed at every call."""
    for _, param in _parameters(module):
        param.del_metadata("declaration")
    return nnx.split(module)[0]


def _parameters(module: nnx.Module) -> Any:
    """(path, parameter) of each; Any, because nnx types path keys more loosely."""
    return nnx.to_flat_state(nnx.state(module, nnx.Param))
