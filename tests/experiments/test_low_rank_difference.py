"""What a training changed, in a small file, and the model from it again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.config import ConfigError
from ivl_jax.experiments.real.low_rank_difference import (
    add_difference,
    difference,
    load_difference,
    rank_within,
    save_difference,
)
from ivl_jax.model.assembly import abstract_params
from ivl_jax.tree_compare import TreeMismatchError
from tests.training.tiny import make_arch

ARCH = make_arch(num_hidden_layers=1)


def random_tree(arch=ARCH, *, seed, scale=1.0, rank=None):
    """Random numbers in the shapes of the parameters; matrices of a rank, if one is given."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if rank is None or len(leaf.shape) == 1:
            values = rng.normal(size=leaf.shape)
        else:
            values = rng.normal(size=(leaf.shape[0], rank)) @ rng.normal(size=(rank, leaf.shape[1]))
        return jnp.asarray(scale * values, jnp.float32)

    return jax.tree.map(fill, abstract_params(arch))


def added(start, change):
    return jax.tree.map(jnp.add, start, change)


def distance(one, two):
    squares = jax.tree.map(lambda a, b: float(jnp.sum((a - b) ** 2)), one, two)
    return sum(jax.tree.leaves(squares)) ** 0.5


def test_a_change_of_that_rank_is_restored_from_its_file(tmp_path):
    start = random_tree(seed=0)
    change = random_tree(seed=1, scale=1e-2, rank=2)
    file = tmp_path / "change.safetensors"
    found = difference(start, added(start, change), rank=2)
    save_difference(file, found, start="S", about={"stage": "value"})
    restored = add_difference(start, load_difference(file, start="S", arch=ARCH))
    zero = jax.tree.map(jnp.zeros_like, change)
    # bfloat16 has 8 bits: 0.4 % of what was changed.
    assert distance(restored, added(start, change)) < 0.01 * distance(change, zero)


def test_what_did_not_change_takes_no_space(tmp_path):
    start = random_tree(seed=0)
    tuned = start | {"norm": random_tree(seed=1)["norm"]}
    file = tmp_path / "change.safetensors"
    save_difference(file, difference(start, tuned, rank=8), start="S", about={})
    change = load_difference(file, start="S", arch=ARCH)
    assert sum(array.size for array in change.values() if array.ndim == 2) == 0
    restored = add_difference(start, change)
    np.testing.assert_array_equal(
        restored["embed_tokens"]["embedding"], start["embed_tokens"]["embedding"]
    )
    assert distance(restored["norm"], tuned["norm"]) < 0.01 * distance(start["norm"], tuned["norm"])


def test_of_any_other_change_the_closest_of_that_rank_is_kept():
    start, change = random_tree(seed=0), random_tree(seed=2)
    tuned = added(start, change)
    errors = [
        distance(add_difference(start, difference(start, tuned, rank=rank)), tuned)
        for rank in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]
    kernel = np.asarray(change["layers"][0]["mlp"]["up_proj"]["kernel"])
    values = np.linalg.svd(kernel, compute_uv=False)
    kept = difference(start, tuned, rank=4)
    left, right = (kept[f"layers.0.mlp.up_proj.kernel.{s}"].astype(np.float32) for s in SIDES)
    lost = np.linalg.norm(kernel - left @ right)
    assert lost == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=0.01)


SIDES = ("left", "right")


@pytest.mark.parametrize("tied", [True, False])
def test_the_largest_rank_within_a_size_is_within_it(tmp_path, tied):
    arch = make_arch(num_hidden_layers=1, tie_word_embeddings=tied)
    start, tuned = random_tree(arch, seed=0), random_tree(arch, seed=1)
    size = 6000
    rank = rank_within(arch, size)
    stored = [
        sum(array.nbytes for array in difference(start, tuned, rank=each).values())
        for each in (rank, rank + 1)
    ]
    assert stored[0] <= size < stored[1]
    with pytest.raises(ConfigError, match=r"a change of rank 1 takes .* bytes, more than 100"):
        rank_within(arch, 100)


def test_files_of_other_models_are_refused(tmp_path):
    start, tuned = random_tree(seed=0), random_tree(seed=1)
    file = tmp_path / "change.safetensors"
    with pytest.raises(ConfigError, match="not the file of a change"):
        load_difference(file, start="S", arch=ARCH)
    save_difference(file, difference(start, tuned, rank=1), start="S", about={})
    with pytest.raises(ConfigError, match="expected a change of the model T, got one of S"):
        load_difference(file, start="T", arch=ARCH)
    with pytest.raises(ConfigError, match=r"layers\.1\.\S+: .*got None"):
        load_difference(file, start="S", arch=make_arch(num_hidden_layers=2))
    with pytest.raises(ConfigError, match=r"embed_tokens\.embedding: factors of \(61, 24\)"):
        load_difference(file, start="S", arch=make_arch(num_hidden_layers=1, hidden_size=24))
    other = random_tree(make_arch(num_hidden_layers=2), seed=1)
    with pytest.raises(TreeMismatchError, match="the model that the training started from"):
        difference(start, other, rank=1)
