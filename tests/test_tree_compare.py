"""The one tree comparison: every difference is named with path, expected and got."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from ivl_jax.tree_compare import (
    TreeMismatchError,
    check_same_tree,
    named_leaves,
    tree_mismatches,
)


class Pair(NamedTuple):
    first: object
    second: object


def test_paths_are_field_names_dictionary_keys_and_indices() -> None:
    tree = Pair({"layers": {3: jnp.zeros(2)}}, [jnp.zeros(1), (jnp.zeros(1),)])
    assert list(named_leaves(tree)) == ["first.layers.3", "second.0", "second.1.0"]


def test_missing_unexpected_and_misshapen_leaves_are_all_named() -> None:
    expected = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(1), "c": jnp.zeros(1, jnp.bfloat16)}
    got = {"a": jnp.zeros((3, 2)), "c": jnp.zeros(1), "d": jnp.zeros((), jnp.int32)}
    assert tree_mismatches(expected, got) == [
        "a: expected float32[2, 3], got float32[3, 2]",
        "b: expected float32[1], got nothing",
        "c: expected bfloat16[1], got float32[1]",
        "d: expected nothing, got int32[]",
    ]


def test_dtypes_count_only_when_asked() -> None:
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32)
    other = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert tree_mismatches({"a": leaf}, {"a": other}, with_dtype=False) == []
    assert len(tree_mismatches({"a": leaf}, {"a": other})) == 1


def test_error_lists_at_most_twenty_differences_and_counts_the_others() -> None:
    many = {f"leaf{i}": jnp.zeros(1) for i in range(25)}
    with pytest.raises(TreeMismatchError) as raised:
        check_same_tree(many, {}, what="the tree in /x", remedy="do this")
    lines = str(raised.value).splitlines()
    assert lines[0] == "the tree in /x does not fit:"
    assert lines[-1] == "do this"
    assert lines[-2].endswith("and 5 more")
    assert len(lines) == 1 + 20 + 1 + 1


def test_equal_trees_pass() -> None:
    check_same_tree({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, what="x", remedy="y")
