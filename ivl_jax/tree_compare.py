"""The one comparison of two trees of arrays: path, expected, got.

In: two trees whose leaves have a shape and a dtype (arrays, `ShapeDtypeStruct`s, stored metadata).
Out: nothing, or an error that lists every difference, at most 20 of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

MISMATCHES_SHOWN = 20


class TreeMismatchError(ValueError):
    """Two trees that should agree do not: path, expected, got, remedy."""


def path_name(path: Sequence[Any]) -> str:
    """Join a pytree key path with dots: `params.layers.0.mlp.up_proj.kernel`."""
    return ".".join(key_name(key) for key in path)


def key_name(key: Any) -> str:
    """The name of one entry of a pytree key path: a field, a dictionary key or an index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Flatten a tree to dotted path → leaf, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def describe_leaf(leaf: Any, *, with_dtype: bool = True) -> str:
    """Write a leaf's dtype and shape: `float32[512, 64]`."""
    shape = f"[{', '.join(str(size) for size in leaf.shape)}]"
    return f"{leaf.dtype}{shape}" if with_dtype else shape


def tree_mismatches(
    expected: Mapping[str, Any], got: Mapping[str, Any], *, with_dtype: bool = True
) -> list[str]:
    """List how two flat trees differ.

    Args:
        expected: dotted path → leaf with shape and dtype, as `named_leaves` gives.
        got: the same for the other tree.
        with_dtype: whether a different dtype counts as a difference.

    Returns:
        One line per path that is missing, unexpected, or has another shape or dtype.
    """
    lines = []
    for name, leaf in expected.items():
        wanted = describe_leaf(leaf, with_dtype=with_dtype)
        if name not in got:
            lines.append(f"{name}: expected {wanted}, got nothing")
        elif (found := describe_leaf(got[name], with_dtype=with_dtype)) != wanted:
            lines.append(f"{name}: expected {wanted}, got {found}")
    lines += [
        f"{name}: expected nothing, got {describe_leaf(leaf, with_dtype=with_dtype)}"
        for name, leaf in got.items()
        if name not in expected
    ]
    return lines


def check_same_tree(
    expected: Mapping[str, Any],
    got: Mapping[str, Any],
    *,
    what: str,
    remedy: str,
    with_dtype: bool = True,
) -> None:
    """Check that two flat trees have the same paths, shapes and dtypes.

    Args:
        expected: dotted path → leaf that the program needs.
        got: dotted path → leaf that was found.
        what: the subject of the error's first line: which tree, from where.
        remedy: what to do about it.
        with_dtype: whether a different dtype counts as a difference.

    Raises:
        TreeMismatchError: they differ; lists path, expected and got, for at most 20 leaves.
    """
    if lines := tree_mismatches(expected, got, with_dtype=with_dtype):
        raise mismatch_error(lines, what=what, remedy=remedy)


def mismatch_error(lines: Sequence[str], *, what: str, remedy: str) -> TreeMismatchError:
    """Make one error that lists at most 20 mismatches of one tree.

    Args:
        lines: one line per mismatch: path, expected, got.
        what: the subject of the error's first line: which tree, from where.
        remedy: what to do about it.

    Returns:
        The error, for the caller to raise.
    """
    more = len(lines) - MISMATCHES_SHOWN
    shown = [*lines[:MISMATCHES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    listed = "".join(f"\n  - {line}" for line in shown)
    return TreeMismatchError(f"{what} does not fit:{listed}\n{remedy}")
