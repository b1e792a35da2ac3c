"""A parameter, declared once: shape, logical axes, first values, tensor in a Hugging Face file.

In: a module whose parameters were made by `declare`. Out: their declarations by path, their
abstract tree, the module's static half. Initialisation, sharding, loading and saving derive from
these; nothing else lists parameters.
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
    """Where in a larger tensor of a Hugging Face file a parameter's tensor lies."""

    module: str  # in the place of the parameter's own module: qkv_proj
    start: int  # its first row there


class Declaration(NamedTuple):
    """What is known of a parameter before it has values, its shape apart."""

    axes: tuple[str | None, ...]  # logical name of each dimension
    initial: Initial  # what fresh parameters hold
    dtype: jnp.dtype | None  # None: the one that all parameters are stored in
    hf_suffix: str | None  # its tensor in its module's place: weight, bias; None: in no file
    transposed: bool  # a file's tensor has the two dimensions the other way round
    fused_in: Fused | None  # in files, its tensor is a part of another module's


def declare(
    *axes: Axis,
    initial: Initial = "normal",
    dtype: DTypeLike | None = None,
    hf_suffix: str | None = "weight",
    transposed: bool = False,
    fused_in: Fused | None = None,
) -> nnx.Param:
    """Declare a parameter; its values come with `nnx.merge`.

    Args:
        *axes: Logical name and size of each dimension.
        initial: What it starts as: `normal`, with the architecture's standard deviation, `zeros` or
            `ones`.
        dtype: What it is always stored in; None: in whatever the other parameters are.
        hf_suffix: Last part of the name of its tensor in a Hugging Face file, after the module's
            path; None: it is in no file.
        transposed: The file has (out, in) where the parameter has (in, out).
        fused_in: The larger tensor of the file that holds the parameter's among its rows; None: it
            is alone.

    Returns:
        The parameter, its shape in place of values.
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
    """The graphdef of a module, without declarations: it is hashed at every call of a program."""
    for _, param in _parameters(module):
        param.del_metadata("declaration")
    return nnx.split(module)[0]


def _parameters(module: nnx.Module) -> Any:
    """(path, parameter) of each; nnx types the keys of a path more loosely than they are."""
    return nnx.to_flat_state(nnx.state(module, nnx.Param))
