"""Arithmetic on parameters: soups, diff vectors, LiNeS."""

import numpy as np
import pytest

from ivl_jax.experiments.baselines.parameter_arithmetic import (
    add,
    average,
    diff_vector,
    scale_by_depth,
)
from ivl_jax.tree_compare import TreeMismatchError


def model(seed, width=3, layers=4):
    rng = np.random.default_rng(seed)
    return {
        "embed_tokens": {"embedding": rng.standard_normal((5, width))},
        "layers": {i: {"kernel": rng.standard_normal((width, width))} for i in range(layers)},
        "norm": {"scale": rng.standard_normal(width)},
    }


def kernel(params, layer):
    return params["layers"][layer]["kernel"]


def test_a_soup_is_the_mean_and_a_soup_of_one_is_the_model():
    models = [model(seed) for seed in range(3)]
    found = average(models)
    for layer in range(4):
        expected = np.mean([kernel(each, layer) for each in models], axis=0)
        np.testing.assert_allclose(kernel(found, layer), expected)
    np.testing.assert_array_equal(kernel(average(models[:1]), 2), kernel(models[0], 2))


def test_a_diff_vector_on_its_own_start_gives_the_tuned_model():
    start, tuned, other = model(0), model(1), model(2)
    change = diff_vector(tuned, start)
    np.testing.assert_allclose(kernel(add(start, change), 3), kernel(tuned, 3))
    moved = add(other, change)
    np.testing.assert_allclose(
        moved["norm"]["scale"],
        other["norm"]["scale"] + tuned["norm"]["scale"] - start["norm"]["scale"],
    )


def test_lines_scales_layers_linearly_from_the_first_factor_to_the_last():
    change = model(0)
    found = scale_by_depth(change, first=0.25)
    for layer, factor in enumerate((0.25, 0.5, 0.75, 1.0)):
        np.testing.assert_allclose(kernel(found, layer), factor * kernel(change, layer))
    np.testing.assert_array_equal(found["norm"]["scale"], change["norm"]["scale"])
    expected = 0.25 * change["embed_tokens"]["embedding"]
    np.testing.assert_allclose(found["embed_tokens"]["embedding"], expected)
    whole = scale_by_depth(change, first=1.0)
    np.testing.assert_array_equal(kernel(whole, 1), kernel(change, 1))
    one = scale_by_depth(model(0, layers=1), first=0.5)
    np.testing.assert_allclose(kernel(one, 0), 0.5 * kernel(change, 0))


@pytest.mark.parametrize("other", [model(0, width=4), model(0, layers=3)], ids=["width", "depth"])
@pytest.mark.parametrize("use", [lambda a, b: average([a, b]), diff_vector, add])
def test_models_of_different_shapes_are_refused(use, other):
    with pytest.raises(TreeMismatchError, match="expected parameters of one shape"):
        use(model(0), other)
