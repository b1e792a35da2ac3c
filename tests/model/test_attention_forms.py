"""Every form of attention computes what the plain one does, in values and in gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.model.attention.entry import attend_to_own
from ivl_jax.model.attention.form import PLAIN, AttentionForm
from ivl_jax.model.attention.over_mesh import run_over_mesh
from ivl_jax.sharding import BATCH_AXES, make_mesh

SMALL = "segments, odd length"
SPLASH = AttentionForm("splash", interpret=True)
SEGMENTED = {"segments": (30, 1, 60)}
# Rows, tokens, query heads, key heads, head width; then what differs from full causal attention.
CASES = {
    "one sequence": ((2, 64, 2, 2, 64), {}),
    "segments, odd length": ((2, 131, 2, 1, 64), SEGMENTED),
    "window": ((1, 160, 2, 1, 64), {"window": 24}),
    "window of one": ((1, 130, 1, 1, 64), {"window": 1}),
    "window longer than the row": ((1, 130, 2, 2, 64), {"window": 500}),
    "soft cap": ((1, 140, 4, 2, 64), {"softcap": 3.0} | SEGMENTED),
    "all, four queries a key, width 128": (
        (2, 150, 4, 1, 128),
        {"window": 40, "softcap": 3.0} | SEGMENTED,
    ),
    "width 256": ((1, 136, 2, 1, 256), {"window": 100} | SEGMENTED),
    "width 80": ((1, 136, 2, 1, 80), SEGMENTED),
}
KERNEL_CASES = tuple(name for name in CASES if name not in ("one sequence", "window", "soft cap"))


def inputs(shape):
    rows, length, heads, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(1), 4)
    query = jax.random.normal(keys[0], (rows, length, heads, width))
    key, value = (jax.random.normal(each, (rows, kv_heads, length, width)) for each in keys[1:3])
    return query, key, value, jax.random.normal(keys[3], query.shape)


def segment_ids(shape, lengths):
    """Sequences of these lengths, then padding; other lengths in the second row."""
    rows, length = shape[:2]
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start = 0
        for number, size in enumerate(lengths[:: 1 if row == 0 else -1], 1):
            ids[row, start : start + size] = number
            start += size
    return jnp.asarray(ids)


@functools.cache
def value_and_gradients(name, form):
    shape, options = CASES[name]
    query, key, value, weights = inputs(shape)
    options = dict(options)
    lengths = options.pop("segments", None)
    options = {
        "segment_ids": None if lengths is None else segment_ids(shape, lengths),
        "window": options.get("window"),
        "softcap": options.get("softcap"),
        "scale": 0.2,
    }
    attention = functools.partial(attend_to_own, form=form)

    def total(*arrays):
        mixed = attention(*arrays, **options)
        return jnp.sum(mixed * weights), mixed

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)


def assert_equal_to_plain(found, name):
    expected = value_and_gradients(name, PLAIN)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, np.abs(other).max())  # a query that sees itself only has no gradient
        np.testing.assert_allclose(one / scale, other / scale, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "block"), [*((name, 50) for name in CASES), (SMALL, 16), (SMALL, 1000)]
)
def test_blocks_equal_the_plain_form(name, block):
    assert_equal_to_plain(value_and_gradients(name, AttentionForm("blocked", block=block)), name)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_the_splash_kernel_equals_the_plain_form(name):
    assert_equal_to_plain(value_and_gradients(name, SPLASH), name)


@pytest.mark.parametrize(
    ("ways", "kv_heads", "expected"),
    [
        ((2, 2, 2), 2, "rows and heads"),
        ((1, 2, 4), 2, "key heads are repeated"),
        ((8, 1, 1), 2, "rows stay whole"),
    ],
)
def test_a_kernel_on_a_mesh_gives_the_numbers_of_one_device(ways, kv_heads, expected):
    seen = []

    def kernel(query, keys, values, segment_ids):
        seen.append((query.shape, keys.shape, segment_ids.shape))
        options = {"window": 10, "scale": 0.2, "softcap": 2.0}
        return attend_to_own(query, keys, values, form=PLAIN, segment_ids=segment_ids, **options)

    shape = (4, 24, 4, kv_heads, 16)
    query, key, value, _ = inputs(shape)
    ids = segment_ids(shape, (7, 12))
    mesh = make_mesh(data=ways[0], fsdp=ways[1], tensor=ways[2])
    form = AttentionForm("splash", 0, mesh, BATCH_AXES, "tensor")
    found = jax.jit(functools.partial(run_over_mesh, kernel, form))(query, key, value, ids)
    alone = kernel(query, key, value, ids)
    np.testing.assert_allclose(found, alone, atol=1e-6)
    on_device = {
        "rows and heads": ((1, 24, 2, 16), (1, 1, 24, 16), (1, 24)),
        "key heads are repeated": ((2, 24, 1, 16), (2, 1, 24, 16), (2, 24)),
        "rows stay whole": ((4, 24, 4, 16), (4, 2, 24, 16), (4, 24)),
    }
    assert seen[0] == on_device[expected]


def test_splash_on_a_mesh_equals_one_device_in_values_and_gradients():
    name = "segments, odd length"
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    form = dataclasses.replace(SPLASH, mesh=mesh, batch_axes=BATCH_AXES, head_axis="tensor")
    assert_equal_to_plain(value_and_gradients(name, form), name)
