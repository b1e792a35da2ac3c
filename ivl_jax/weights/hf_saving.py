"""Saves parameters as a Hugging Face folder that transformers loads: one file or indexed shards.

In: an architecture and its parameters, on any devices. Out: the folder, once it is complete.
"""

import collections
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, DTypeLike

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, abstract_params
from ivl_jax.tree_compare import check_same_tree, named_leaves
from ivl_jax.weights.hf_folder import INDEX_FILE, SINGLE_FILE, new_folder
from ivl_jax.weights.hf_names import PARAM_DTYPES, HfTensor, file_shapes, flat_paths, hf_tensors
from ivl_jax.weights.safetensors_file import write_file


def save_params(
    folder: Path | str,
    arch: ArchConfig,
    params: Params,
    *,
    dtype: DTypeLike,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write parameters and `config.json` as a folder that transformers loads.

    The folder appears once it is complete. Rows beyond the vocabulary are left out.

    Args:
        folder: the folder to create.
        arch: the architecture.
        params: its parameters, layers unstacked, on any devices.
        dtype: float32 or bfloat16, of every tensor written.
        shard_bytes: larger models are split into files of at most this many bytes (or one tensor).
        overwrite: replace an existing model folder.

    Raises:
        FileExistsError: the folder exists, has files, and may not be replaced.
        TreeMismatchError: the parameters do not match the architecture.
        ValueError: `dtype` is not supported.
    """
    with new_folder(Path(folder), overwrite=overwrite) as staging:
        write_params(staging, arch, params, dtype=dtype, shard_bytes=shard_bytes)


def write_params(
    folder: Path,
    arch: ArchConfig,
    params: Params,
    *,
    dtype: DTypeLike,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the files of `save_params` into an existing folder; every process must call it."""
    dtype = jnp.dtype(dtype)
    if dtype not in PARAM_DTYPES:
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype}")
    if any(
        "qkv_proj" in path or leaf.dtype == jnp.int8 for path, leaf in flat_paths(params).items()
    ):
        raise ValueError(
            "parameters arranged for decoding, or in int8, cannot be saved: save the model as it "
            "was loaded, before it was composed"
        )
    rows = params["embed_tokens"]["embedding"].shape[0]
    check_same_tree(
        named_leaves(abstract_params(arch, vocab_rows=max(rows, arch.vocab_size))),
        named_leaves(params),
        what=f"parameters to be saved as {arch.model_type}",
        remedy="Save unstacked layers (unstack_layers) with the architecture that they belong to; "
        "with an untied head it must have tie_word_embeddings=False.",
        with_dtype=False,
    )
    leaves = flat_paths(params)
    sinks = {name: _Sink(name, shape, []) for name, shape in file_shapes(arch).items()}
    for path, tensor in sorted(hf_tensors(arch).items(), key=lambda item: item[1].start):
        sinks[tensor.name].parts.append((tensor, leaves[path]))
    shards = _split(list(sinks.values()), dtype.itemsize, shard_bytes)
    for file, group in shards.items():
        shapes = {sink.name: sink.shape for sink in group}
        arrays = (_array_in_file(sink, dtype) for sink in group)
        if jax.process_index() == 0:
            write_file(folder / file, shapes, arrays, dtype=dtype)
        else:
            collections.deque(arrays, maxlen=0)  # gathering takes every process
    if jax.process_index() > 0:
        return
    if len(shards) > 1:
        total = sum(dtype.itemsize * math.prod(sink.shape) for sink in sinks.values())
        file_of = {sink.name: file for file, group in shards.items() for sink in group}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": file_of})
    _write_json(folder / "config.json", arch.to_hf() | {"dtype": str(dtype)})


class _Sink(NamedTuple):
    """One tensor of a file, and the parameters stored in it, from first row to last."""

    name: str
    shape: tuple[int, ...]  # without vocabulary padding
    parts: list[tuple[HfTensor, Array]]


def _split(sinks: list[_Sink], item_bytes: int, shard_bytes: int) -> dict[str, list[_Sink]]:
    """File name → its tensors, in order."""
    groups: list[list[_Sink]] = [[]]
    used = 0
    for sink in sinks:
        size = item_bytes * math.prod(sink.shape)
        if groups[-1] and used + size > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(sink)
        used += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _array_in_file(sink: _Sink, dtype: np.dtype) -> np.ndarray:
    """The whole tensor on the host; every process must call it."""
    parts = []
    for tensor, leaf in sink.parts:
        array = _oriented(leaf, transposed=tensor.transposed, dtype=dtype)
        if array.is_fully_addressable:
            whole = np.asarray(array)
        else:
            whole = multihost_utils.process_allgather(array, tiled=True)
        parts.append(whole[: tensor.shape[0]])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _oriented(leaf: Array, *, transposed: bool, dtype: np.dtype) -> Array:
    """The parameter in the file's orientation; a copy, because an array caches its host copy."""
    return jnp.copy((leaf.T if transposed else leaf).astype(dtype))
