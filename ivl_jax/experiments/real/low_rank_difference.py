"""What a training changed in a model, as a small file: the best low-rank approximation of it.

    tuned kernel  ≈  start kernel + left @ right

In: the parameters before and after. Out: a safetensors file; or from the parameters before and the
file, those after. A model whose training added a LoRA adapter of at most that rank is restored but
for the rounding to bfloat16; of a fully trained one, the largest singular values are kept.

Source: Eckart–Young–Mirsky: the truncated singular value decomposition is the closest matrix of its
rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from ivl_jax.config import ConfigError
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.assembly import abstract_params
from ivl_jax.model.decoder import Params
from ivl_jax.paths import write_atomically
from ivl_jax.tree_compare import check_same_tree, named_leaves

_SIDES = ("left", "right")
_RECORD = "ivl_difference"
_VERSION = 1
_STORED = np.dtype(jnp.bfloat16)

Difference = dict[str, Float[np.ndarray, "..."]]
"""Parameter → what is added to it; of a matrix `NAME.left` and `NAME.right`."""


def difference(start: Params, tuned: Params, *, rank: int) -> Difference:
    """Approximate what a training changed.

    Args:
        start: Parameters before.
        tuned: Parameters after, of the same architecture; layers unstacked.
        rank: Of each matrix's change, 0 where nothing changed; vectors are kept whole.

    Returns:
        The change, in bfloat16.

    Raises:
        TreeMismatchError: They are not of the same architecture.
    """
    check_same_tree(
        named_leaves(start),
        named_leaves(tuned),
        what="the model after training",
        remedy="Name the model that the training started from.",
        with_dtype=False,
    )
    found: Difference = {}
    after = named_leaves(tuned)
    for name, old in named_leaves(start).items():
        changed = np.asarray(after[name], np.float32) - np.asarray(old, np.float32)
        if changed.ndim != 2:
            found[name] = changed.astype(_STORED)
            continue
        left, values, right = np.linalg.svd(changed, full_matrices=False)
        scale = np.sqrt(values[: rank if changed.any() else 0])
        found[f"{name}.left"] = (left[:, : len(scale)] * scale).astype(_STORED)
        found[f"{name}.right"] = (scale[:, None] * right[: len(scale)]).astype(_STORED)
    return found


def add_difference(start: Params, change: Mapping[str, np.ndarray]) -> Params:
    """The parameters after the training, as well as the change says.

    Args:
        start: Parameters before.
        change: From `difference`.

    Returns:
        Parameters in float32.
    """
    found = []
    for name, old in named_leaves(start).items():
        if old.ndim == 2:
            left, right = (change[f"{name}.{side}"].astype(np.float32) for side in _SIDES)
            added = left @ right
        else:
            added = change[name].astype(np.float32)
        found.append(jnp.asarray(np.asarray(old, np.float32) + added))
    return jax.tree.unflatten(jax.tree.structure(start), found)


def save_difference(
    file: Path, change: Mapping[str, np.ndarray], *, start: str, about: Mapping[str, str]
) -> None:
    """Write a change, atomically.

    Args:
        file: The safetensors file.
        change: From `difference`.
        start: Identifies the model before.
        about: What else is recorded.
    """
    record = {"version": _VERSION, "start": start, **about}
    tensors = {name: np.ascontiguousarray(array) for name, array in change.items()}
    content = safetensors.numpy.save(tensors, metadata={_RECORD: json.dumps(record)})
    write_atomically(file, content)


def load_difference(file: Path, *, start: str, arch: ArchConfig) -> Difference:
    """Read a change that was made of a certain model.

    Args:
        file: From `save_difference`.
        start: Identifies the model that it will be added to.
        arch: That model's architecture.

    Returns:
        The change.

    Raises:
        ConfigError: The file holds something else, or the change of another model.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as content:
            record = json.loads((content.metadata() or {}).get(_RECORD, "null"))
            change = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not the file of a change: {error}") from error
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise ConfigError(
            f"{file}: expected a change of version {_VERSION} in its metadata, got {record!r:.80}"
        )
    if record.get("start") != start:
        raise ConfigError(
            f"{file}: expected a change of the model {start}, got one of {record.get('start')}: "
            "use the model that the training started from, with the same budget"
        )
    _check_shapes(file, change, arch)
    return change


def rank_within(arch: ArchConfig, size: int) -> int:
    """The largest rank at which a change is at most so large.

    Args:
        arch: Of the model.
        size: Bytes.

    Returns:
        The rank.

    Raises:
        ConfigError: Not even rank 1 fits.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(abstract_params(arch))]
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    per_rank = sum(sum(shape) for shape in shapes if len(shape) == 2)
    rank = (size // _STORED.itemsize - vectors) // per_rank
    if rank < 1:
        least = (vectors + per_rank) * _STORED.itemsize
        raise ConfigError(f"a change of rank 1 takes {least:,} bytes, more than {size:,}")
    return rank


def _check_shapes(file: Path, change: Mapping[str, np.ndarray], arch: ArchConfig) -> None:
    expected = named_leaves(abstract_params(arch))
    problems = []
    for name, leaf in expected.items():
        if len(leaf.shape) != 2:
            found = change[name].shape if name in change else None
            problems += [] if found == leaf.shape else [f"{name}: {leaf.shape}, got {found}"]
            continue
        sides = [change.get(f"{name}.{side}") for side in _SIDES]
        found = [None if side is None else side.shape for side in sides]
        left, right = (shape or (0, 0) for shape in found)
        if (left[0], right[1]) != leaf.shape or left[1] != right[0]:
            problems.append(f"{name}: factors of {leaf.shape}, got {found[0]} and {found[1]}")
    if problems:
        more = "" if len(problems) <= 20 else f"\n  and {len(problems) - 20} more"
        listed = "\n  ".join(problems[:20])
        raise ConfigError(f"{file}: expected the change of another architecture:\n  {listed}{more}")
