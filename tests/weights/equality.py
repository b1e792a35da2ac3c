"""Comparing parameters bit by bit."""

import numpy as np
from flax import traverse_util

from ivl_jax.model.decoder import Params


def assert_equal_bits(left: Params, right: Params) -> None:
    left, right = traverse_util.flatten_dict(left), traverse_util.flatten_dict(right)
    assert set(left) == set(right)
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(right[path]).tobytes(), path
