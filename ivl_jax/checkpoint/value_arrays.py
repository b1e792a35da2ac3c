"""The arrays of a value folder: those of a whole network, or of an adapter alone.

In: a value folder's metadata; parameters on any mesh. Out: the arrays as they are stored, or
parameters on any mesh, with an adapter merged into its model.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ivl_jax.checkpoint.arrays import restore_arrays, to_storable
from ivl_jax.checkpoint.value_metadata import METADATA_NAME, ValueFolderError, ValueMetadata
from ivl_jax.finite_arrays import check_finite
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, unstack_layers
from ivl_jax.model.lora import adapter_shapes, frozen_arch, join, merge
from ivl_jax.model.network import (
    Architecture,
    abstract_network,
    architecture_from_json,
    vocabulary_dimensions,
)
from ivl_jax.model.projection import Lora
from ivl_jax.sharding import DEFAULT_RULES, ShardingRules, padded_vocab_rows, parameter_shardings
from ivl_jax.tree_compare import check_same_tree, named_leaves
from ivl_jax.weights.hf_checkpoint import load_params

logger = logging.getLogger(__name__)

PARAMS_FOLDER = "params"


def value_architecture(metadata: ValueMetadata, folder: epath.PathLike) -> Architecture:
    """The architecture of a value network.

    Raises:
        ValueFolderError: its `ivl.json` describes an unknown architecture, or an adapter of a
            network without layers.
    """
    try:
        arch = architecture_from_json(metadata.architecture)
        if metadata.adapter is not None and not isinstance(arch, ArchConfig):
            raise ValueError("expected a decoder, which an adapter changes, got a linear map")
    except ValueError as error:
        raise ValueFolderError(f"{folder}/{METADATA_NAME}: architecture: {error}") from error
    return arch


def lora_of(metadata: ValueMetadata) -> Lora | None:
    """The adapter that a value folder holds; None: it holds a whole network."""
    record = metadata.adapter
    if record is None:
        return None
    return Lora(record["rank"], float(record["alpha"]), record["targets"])


def stored_arrays(params: Params, metadata: ValueMetadata) -> dict[str, Any]:
    """Unstack layers, drop padding rows of the vocabulary, and check the tree strictly.

    Args:
        params: of the network, or of its adapter; on any mesh.
        metadata: of the value folder.

    Returns:
        Nested string dictionaries of arrays.

    Raises:
        TreeMismatchError: the parameters do not match the metadata.
    """
    arch = architecture_from_json(metadata.architecture)
    if not all(isinstance(index, int) for index in params.get("layers", ())):
        params = unstack_layers(params)
    dimensions = vocabulary_dimensions(arch)

    def crop(path: tuple[Any, ...], leaf: Any) -> Any:
        name = ".".join(str(key.key) for key in path)
        cut = [slice(None)] * leaf.ndim
        for dimension in dimensions.get(name, ()):
            cut[dimension] = slice(min(arch.vocab_size, leaf.shape[dimension]))
        cropped = leaf[tuple(cut)] if name in dimensions else leaf
        if cropped.shape != leaf.shape:
            logger.info("%s: vocabulary padding rows are not stored: %s", name, leaf.shape)
        return cropped

    params = jax.tree_util.tree_map_with_path(crop, params)
    stored = to_storable(params)
    check_same_tree(
        named_leaves(to_storable(_stored_shapes(metadata, arch))),
        named_leaves(stored),
        what="the value network to be saved",
        remedy="metadata.architecture must match these parameters (also tie_word_embeddings), and "
        "metadata.adapter says whether they are an adapter",
        with_dtype=False,
    )
    return stored


def load_network(
    folder: epath.Path,
    metadata: ValueMetadata,
    *,
    model_folder: Path | None,
    param_dtype: DTypeLike,
    mesh: Mesh | None,
    sharding_rules: ShardingRules,
) -> Params:
    """Read the parameters of a value network; an adapter is merged into its model.

    Args:
        folder: the value folder.
        metadata: its metadata.
        model_folder: where an adapter's model is; None for a whole network.
        param_dtype: of every parameter; an adapter is merged in float32 and then cast.
        mesh: where they live, or None.
        sharding_rules: how they are sharded over the mesh.

    Returns:
        The network's parameters, without adapters.

    Raises:
        ValueFolderError: it has no arrays.
        TreeMismatchError: the arrays do not match the metadata.
        NonFiniteWeightsError: an array has NaN or infinity.
    """
    arch = value_architecture(metadata, folder)
    if metadata.adapter is None:
        rows = _vocab_rows(arch, mesh, sharding_rules)
        shapes = abstract_network(arch, param_dtype=param_dtype, vocab_rows=rows)
        return _restore(folder, shapes, _places(shapes, arch, mesh, sharding_rules), metadata)
    shapes = _stored_shapes(metadata, arch)
    adapter = _restore(folder, shapes, _places(shapes, arch, mesh, sharding_rules), metadata)
    return merge_into_model(
        adapter,
        metadata,
        model_folder,
        param_dtype=param_dtype,
        mesh=mesh,
        sharding_rules=sharding_rules,
    )


def merge_into_model(
    adapter: Params,
    metadata: ValueMetadata,
    model_folder: Path | None,
    *,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    sharding_rules: ShardingRules = DEFAULT_RULES,
) -> Params:
    """Merge an adapter into the weights of its model.

    Args:
        adapter: its parameters, layers unstacked.
        metadata: of its value folder.
        model_folder: where its model is.
        param_dtype: as in `load_network`, like the rest.
        mesh: where the parameters live, or None.
        sharding_rules: how they are sharded over the mesh.

    Returns:
        The parameters of an equal network without adapters.
    """
    arch, lora = architecture_from_json(metadata.architecture), lora_of(metadata)
    assert isinstance(arch, ArchConfig)
    assert lora is not None
    assert model_folder is not None, "an adapter's model is found before its arrays are read"
    plain, rows = frozen_arch(arch), _vocab_rows(arch, mesh, sharding_rules)
    shapes = abstract_network(plain, vocab_rows=rows)
    model = load_params(
        model_folder,
        plain,
        param_dtype=jnp.float32,
        vocab_rows=rows,
        shardings=_places(shapes, plain, mesh, sharding_rules),
    )
    return _merge_by_layer(adapter, model, lora, param_dtype)


def load_adapter(
    folder: epath.PathLike, metadata: ValueMetadata, *, shardings: Params | None
) -> Params:
    """Read the adapter of a LoRA value folder, to train it further.

    Args:
        folder: the value folder.
        metadata: its metadata.
        shardings: of each of the adapter's parameters, layers unstacked.
            None: they go to the first device.

    Returns:
        Float32 parameters, layers unstacked.

    Raises:
        ValueFolderError: it has no arrays.
        TreeMismatchError: the arrays do not match the metadata.
        NonFiniteWeightsError: an array has NaN or infinity.
    """
    arch = value_architecture(metadata, folder)
    shapes = _stored_shapes(metadata, arch)
    return _restore(epath.Path(folder), shapes, shardings, metadata)


def _vocab_rows(arch: Architecture, mesh: Mesh | None, rules: ShardingRules) -> int | None:
    return None if mesh is None else padded_vocab_rows(arch.vocab_size, mesh, rules)


def _places(
    shapes: Params, arch: Architecture, mesh: Mesh | None, rules: ShardingRules
) -> Params | None:
    """The sharding of each parameter; None without a mesh."""
    if mesh is None:
        return None
    units = {"heads": arch.num_attention_heads, "kv_heads": arch.num_key_value_heads}
    return parameter_shardings(shapes, mesh, rules, units=units)


def _stored_shapes(metadata: ValueMetadata, arch: Architecture) -> Params:
    """The shapes of what a folder stores, vocabulary rows not padded."""
    lora = lora_of(metadata)
    if lora is None:
        return abstract_network(arch)
    assert isinstance(arch, ArchConfig)
    return adapter_shapes(arch, lora)


def _restore(
    folder: epath.Path, target: Params, shardings: Params | None, metadata: ValueMetadata
) -> Params:
    """The stored arrays in the target's shapes and dtypes."""
    if not (folder / PARAMS_FOLDER).exists():
        raise ValueFolderError(
            f"{folder} has no arrays: it only describes a run; its value network is in "
            f"{folder.parent}/value, or `python -m ivl_jax.checkpoint export-value` makes one"
        )
    name = f"the value network in {folder}"
    if shardings is not None:
        target = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            target,
            shardings,
        )
    params = restore_arrays(
        folder / PARAMS_FOLDER,
        target,
        stored_like=_stored_shapes(metadata, value_architecture(metadata, folder)),
        what=name,
        remedy="its arrays do not match the architecture in its ivl.json: export it again",
        cast=True,
    )
    half = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(target))
    reason = "float16 ends at 65,504, float32 does not; or " if half else ""
    check_finite(
        named_leaves(params), what=name, remedy=f"{reason}its training diverged: train it again"
    )
    return params


def _merge_by_layer(adapter: Params, model: Params, lora: Lora, dtype: DTypeLike) -> Params:
    """All parameters, merged; the float32 weights of one layer at a time are held twice."""
    joined = join(adapter, model)
    layers, compiled = joined.pop("layers"), {}
    model.clear()  # so that each float32 layer is freed once it is merged

    def merged(name: str, part: Params) -> Params:
        places = jax.tree.map(lambda leaf: leaf.sharding, _plain(part))
        if name not in compiled:
            compiled[name] = _compile_merge(lora, dtype, places)
        return compiled[name](part)

    whole = {name: merged(name, part) for name, part in joined.items()}
    whole |= {"layers": {i: merged("layer", layers.pop(i)) for i in sorted(layers)}}
    if dtype == jnp.float16:
        remedy = "float16 ends at 65,504: use float32 or bfloat16"
        check_finite(named_leaves(whole), what="an adapter merged into its model", remedy=remedy)
    return whole


def _compile_merge(lora: Lora, dtype: DTypeLike, places: Params) -> Callable[[Params], Params]:
    return jax.jit(functools.partial(merge, lora=lora, dtype=dtype), out_shardings=places)


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """The entries that remain after a merge."""
    return {
        name: _plain(each) if isinstance(each, dict) else each
        for name, each in part.items()
        if name not in ("lora_a", "lora_b")
    }
