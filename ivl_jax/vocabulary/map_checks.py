"""Checks what a vocabulary map's file holds: the kinds of its metadata, the shapes of its arrays.

In: the metadata's fields, the tensors. Out: what is wrong with them, in words.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ivl_jax.json_files import json_kind

_SUM_TOLERANCE = 1e-4  # float32 rounding of a row's weights


def kind_problems(record: Mapping[str, Any]) -> list[str]:
    """Find metadata fields of the wrong kind.

    Args:
        record: every field of a map's metadata, as JSON gives it.

    Returns:
        One clause per field.
    """
    return [
        f"{name}: expected {expected}, got {json_kind(record[name])}"
        for name, (expected, is_kind) in _KINDS.items()
        if not is_kind(record[name])
    ]


def array_problems(
    tensors: Mapping[str, np.ndarray], value_vocab_size: int, *, is_projection: bool
) -> list[str]:
    """Find everything that is wrong with a map's arrays.

    Args:
        tensors: of the file.
        value_vocab_size: number of ids of the value network's tokenizer.
        is_projection: whether there are several entries per base token, rather than one.

    Returns:
        One clause per problem.
    """
    expected = {"value_index": np.dtype(np.int32), "weight": np.dtype(np.float32)}
    if set(tensors) != set(expected):
        return [f"expected the tensors {sorted(expected)}, got {sorted(tensors)}"]
    shape, ndim = ("a matrix", 2) if is_projection else ("a vector", 1)
    problems = [
        f"{name}: expected {shape} of {dtype}, got {tensors[name].dtype} {tensors[name].shape}"
        for name, dtype in expected.items()
        if tensors[name].dtype != dtype
        or tensors[name].ndim != ndim
        or 0 in tensors[name].shape[1:]
    ]
    if problems:
        return problems
    index, weight = tensors["value_index"], tensors["weight"]
    if len(index) != len(weight):
        problems.append(f"value_index has {len(index)} rows, weight {len(weight)}")
    elif index.shape != weight.shape:
        problems.append(f"value_index has the shape {index.shape}, weight {weight.shape}")
    if index.size and (index.min() < 0 or index.max() >= value_vocab_size):
        problems.append(
            f"value_index runs from {index.min()} to {index.max()}, but the value network's "
            f"tokenizer has the ids 0 to {value_vocab_size - 1}"
        )
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        problems.append("weight has entries that are negative or not finite")
    elif is_projection:
        total = weight.sum(axis=1)
        wrong = np.flatnonzero((total != 0) & (np.abs(total - 1) > _SUM_TOLERANCE))
        if wrong.size:
            problems.append(
                f"the weights of {wrong.size} rows sum to neither 0 nor 1, such as row {wrong[0]}: "
                f"{total[wrong[0]]:.4g}"
            )
    return problems


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 3
        and isinstance(pair[0], str)
        and all(_is_count(one) for one in pair[1:])
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


_TEXT = ("text", lambda value: isinstance(value, str))
_COUNT = ("a count", _is_count)
_SHARE = ("a share", lambda value: type(value) in (int, float) and 0 <= value <= 1)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("method", "base_name", "base_fingerprint"), _TEXT),
    **dict.fromkeys(("value_name", "value_fingerprint"), _TEXT),
    **dict.fromkeys(("value_vocab_size", "texts"), _COUNT),
    **dict.fromkeys(("token_coverage", "text_coverage"), _SHARE),
    "centred": ("true or false", lambda value: isinstance(value, bool)),
    "special_pairs": (
        "a list of role, base id and value id",
        lambda value: isinstance(value, list) and all(map(_is_pair, value)),
    ),
}
