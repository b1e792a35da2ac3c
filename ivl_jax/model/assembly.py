"""A decoder's abstract parameters, and the module assembled from graphdef and parameters.

In: an `ArchConfig`; or a graphdef and a nested dict of arrays. Out: shapes and declarations of its
parameters; or the module, after checking the arrays' paths.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.attention.form import PLAIN
from ivl_jax.model.layers import Decoder
from ivl_jax.model.parameter import Declaration, ParamPath, abstract_tree, declarations
from ivl_jax.model.projection import AS_TRAINED, KernelForm

Params = dict[str, Any]


def abstract_params(
    arch: ArchConfig,
    *,
    param_dtype: DTypeLike = jnp.float32,
    vocab_rows: int | None = None,
    scan_layers: bool = False,
    form: KernelForm = AS_TRAINED,
) -> Params:
    """Shapes and dtypes of a decoder's parameters, as `jax.ShapeDtypeStruct`s; allocates nothing.

    Args:
        arch: The architecture.
        param_dtype: Dtype the parameters are stored in.
        vocab_rows: Rows of embedding and head, more than the vocabulary to pad for a mesh; None:
            `arch.vocab_size`.
        scan_layers: Stack the layers.
        form: How kernels are stored.

    Returns:
        A nested dict whose paths mirror Hugging Face's names, except for fused kernels.
    """
    rows = arch.vocab_size if vocab_rows is None else vocab_rows
    params = abstract_tree(_bare(arch, form=form, scan_layers=scan_layers, rows=rows), param_dtype)
    if not scan_layers:
        return params

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((arch.num_hidden_layers, *leaf.shape), leaf.dtype)

    return params | {"layers": jax.tree.map(stacked, params["layers"])}


def parameter_declarations(
    arch: ArchConfig, *, form: KernelForm = AS_TRAINED
) -> dict[ParamPath, Declaration]:
    """Path → declaration of every parameter, layers unstacked."""
    return declarations(_bare(arch, form=form, scan_layers=False, rows=arch.vocab_size))


def _bare(arch: ArchConfig, *, form: KernelForm, scan_layers: bool, rows: int) -> Decoder:
    """A decoder of which only the parameters are used."""
    return Decoder(
        arch,
        compute_dtype=jnp.float32,
        remat="none",
        scan_layers=scan_layers,
        form=form,
        attention=PLAIN,
        all_depths=False,
        vocab_rows=rows,
    )


def static_attribute(graphdef: nnx.GraphDef, name: str) -> Any:
    """A static attribute of the module that a graphdef describes.

    The graphdef also lists those of the modules inside, which therefore may not have this name.
    """
    return cast(Any, dict(graphdef.attributes)[name]).value


def assemble(graphdef: nnx.GraphDef, params: Params) -> Decoder:
    """The module; a head in `params` is left out if the architecture ties it.

    `nnx.merge` matches leaves only by their order, so the paths are checked here.
    """
    arch = static_attribute(graphdef, "arch")
    form = (static_attribute(graphdef, "scan_layers"), static_attribute(graphdef, "form"))
    extra_head = arch.tie_word_embeddings and "lm_head" in params
    trunk = {name: part for name, part in params.items() if not (extra_head and name == "lm_head")}
    if jax.tree.structure(trunk) != _expected_structure(arch, *form):
        raise ValueError(_structure_problem(trunk, arch, *form))
    return nnx.merge(graphdef, trunk)


@functools.cache
def _expected_structure(
    arch: ArchConfig, scan_layers: bool, form: KernelForm
) -> jax.tree_util.PyTreeDef:
    expected = abstract_params(arch, scan_layers=scan_layers, form=form)
    return jax.tree.structure(expected)


def _structure_problem(
    params: Params, arch: ArchConfig, scan_layers: bool, form: KernelForm
) -> str:
    """Which paths are missing or unexpected, at most 20."""

    def paths(tree: Params) -> set[str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        }

    fitting = abstract_params(arch, scan_layers=scan_layers, form=form)
    expected, found = paths(fitting), paths(params)
    lines = [f"missing {path}" for path in sorted(expected - found)]
    lines += [f"unexpected {path}" for path in sorted(found - expected)]
    wanted = "scanned (stack_layers)" if scan_layers else "unstacked (unstack_layers)"
    wanted += ", arranged for decoding (to_decode_layout)" if form.rows else ""
    wanted += ", in int8 (quantize)" if form.int8 else ""
    wanted += ", with an adapter (lora.join)" if form.lora else ""
    return "\n  ".join([f"params do not fit this decoder, layers {wanted}:", *lines[:20]])
