"""Arithmetic on the parameters of models of one shape: soups, diff vectors, LiNeS.

In: parameter trees. Out: trees of the same shape. All functions are pure.
"""

from collections.abc import Sequence
from typing import Any

import jax

from ivl_jax.model.decoder import Params
from ivl_jax.tree_compare import TreeMismatchError, named_leaves, tree_mismatches


def average(models: Sequence[Params]) -> Params:
    """The mean of several models' parameters, a soup.

    Source: Wortsman et al., arXiv 2203.05482 (uniform soup).

    Raises:
        TreeMismatchError: two of them have different shapes.
    """
    for other in models[1:]:
        _check_shapes(models[0], other, "models of a soup")
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *models)


def diff_vector(tuned: Params, start: Params) -> Params:
    """What a training has changed: the parameters after it minus those before.

    Raises:
        TreeMismatchError: the two have different shapes.
    """
    _check_shapes(start, tuned, "a diff vector")
    return jax.tree.map(lambda after, before: after - before, tuned, start)


def add(params: Params, change: Params) -> Params:
    """Parameters with a diff vector added: diff-vector transfer, if it is another model's.

    Raises:
        TreeMismatchError: the two have different shapes.
    """
    _check_shapes(params, change, "diff-vector transfer")
    return jax.tree.map(lambda leaf, by: leaf + by, params, change)


def scale_by_depth(change: Params, *, first: float, last: float = 1.0) -> Params:
    """Scale a diff vector linearly with depth (LiNeS): general shallow layers change less.

    Args:
        change: a diff vector; layers unstacked.
        first: factor of the embedding and the first layer.
        last: factor of the last layer, the final norm and an untied head.

    Returns:
        The scaled diff vector.

    Source:
        Wang et al., arXiv 2410.17146, layer l of L by α + β (l − 1) / (L − 1).

    Example:
        >>> ones = {"embed_tokens": 1.0, "layers": {0: 1.0, 1: 1.0, 2: 1.0}, "norm": 1.0}
        >>> scale_by_depth(ones, first=0.5)["layers"]
        {0: 0.5, 1: 0.75, 2: 1.0}
    """
    layers = change["layers"]
    most = max(len(layers) - 1, 1)

    def scaled(tree: Any, factor: float) -> Any:
        return jax.tree.map(lambda leaf: factor * leaf, tree)

    rest = {
        name: scaled(part, first if name == "embed_tokens" else last)
        for name, part in change.items()
        if name != "layers"
    }
    by_layer = {
        index: scaled(layers[index], first + (last - first) * place / most)
        for place, index in enumerate(sorted(layers))
    }
    return rest | {"layers": by_layer}


def _check_shapes(expected: Params, got: Params, what: str) -> None:
    lines = tree_mismatches(named_leaves(expected), named_leaves(got), with_dtype=False)
    if lines:
        raise TreeMismatchError(
            f"{what}: expected parameters of one shape, but {len(lines)} differ:\n"
            + "\n".join(lines[:5])
            + "\nuse a value network: it carries over to other shapes"
        )
