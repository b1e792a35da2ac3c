"""How caches are split where kv heads do not divide their mesh axis."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import PartitionSpec

from ivl_jax.composed.network import Composition, Layout, Network
from ivl_jax.config import MeshConfig
from ivl_jax.decoding.device.shardings import cache_sharding, replicated_cache, row_multiple
from ivl_jax.decoding.loading import decoding_mesh, usable_tensor_ways
from ivl_jax.model.linear_map import LinearMapConfig
from ivl_jax.model.network import build_network
from ivl_jax.sharding import LAYOUTS, bytes_per_device, make_mesh
from tests.decoding.tiny import tiny_arch


def network(kv_heads, *, rules="full", **mesh):
    arch = tiny_arch(heads=2 * kv_heads, kv_heads=kv_heads, width=16 * kv_heads)
    layout = Layout(make_mesh(**mesh), LAYOUTS[rules])
    return Network(build_network(arch), arch, arch.vocab_size, layout=layout)


@pytest.mark.parametrize(
    ("kv_heads", "mesh", "shard", "multiple"),
    [
        (8, {"tensor": 8}, (16, 1), 1),
        (4, {"tensor": 8}, (8, 1), 2),
        (3, {"tensor": 8}, (2, 3), 8),
        (5, {"tensor": 8}, (2, 5), 8),
        (6, {"tensor": 4, "data": 2}, (4, 3), 4),
        (3, {"fsdp": 2, "tensor": 4}, (2, 3), 8),
        (2, {"data": 2, "fsdp": 4}, (2, 2), 8),
    ],
)
def test_each_device_holds_its_share_of_a_cache(kv_heads, mesh, shard, multiple):
    one = network(kv_heads, **mesh)
    shape = (16, kv_heads, 8, 4)
    sharding = cache_sharding(one)
    assert sharding.shard_shape(shape) == (*shard, 8, 4)
    assert math.prod(shard) * 8 == 16 * kv_heads
    # A place for each part, and none twice.
    cache = jax.device_put(jax.numpy.zeros(shape), sharding)
    assert sum(bytes_per_device(cache).values()) == cache.nbytes
    assert row_multiple(Composition(one)) == multiple
    assert replicated_cache(one) is None


def test_a_batch_divides_over_all_networks():
    base, value = (network(heads, tensor=8) for heads in (8, 4))
    assert row_multiple(Composition(base)) == 1
    assert row_multiple(Composition(base, (value,))) == 2
    assert row_multiple(Composition(base, draft=network(3, tensor=8))) == 8
    alone = dataclasses.replace(base, layout=None)
    assert row_multiple(Composition(alone)) == 1


def test_a_replicated_cache_says_what_it_costs():
    cost = replicated_cache(network(2, rules="replicated", fsdp=2, tensor=4))
    # 2 layers × keys and values × 2 heads of 8 numbers in 4 bytes
    assert cost is not None
    assert "4 devices hold the same cache: 256 bytes per token and row on each" in cost
    assert "instead of 64" in cost
    assert "8,388,608 bytes" in cost
    linear = dataclasses.replace(network(2, rules="replicated", tensor=4), arch=LinearMapConfig(9))
    assert replicated_cache(linear) is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "ways"),
    [
        (32, 32, 8, 8),
        (32, 8, 8, 8),
        (32, 8, 16, 16),  # 8 × 2 parts of a cache
        (32, 4, 8, 8),  # TinyLlama: 4 × 2
        (28, 4, 8, 4),  # Qwen2.5-7B
        (14, 2, 8, 2),  # Qwen2.5-0.5B
        (9, 3, 8, 1),  # SmolLM2-135M
        (9, 3, 6, 3),
        (15, 5, 8, 1),  # SmolLM2-360M
        (15, 5, 10, 5),
    ],
)
def test_the_tensor_axis_is_as_wide_as_the_heads_can_use(heads, kv_heads, devices, ways):
    arch = tiny_arch(heads=heads, kv_heads=kv_heads, width=8 * heads)
    assert usable_tensor_ways(arch, devices) == ways


@pytest.mark.parametrize(
    ("heads", "kv_heads", "flags", "expected"),
    [
        (8, 4, MeshConfig(fsdp=1, tensor=-1), {"data": 1, "fsdp": 1, "tensor": 8}),
        (6, 2, MeshConfig(fsdp=1, tensor=-1), {"data": 4, "fsdp": 1, "tensor": 2}),
        (6, 2, MeshConfig(fsdp=2, tensor=-1), {"data": 2, "fsdp": 2, "tensor": 2}),
        (6, 2, MeshConfig(fsdp=1, tensor=8), {"data": 1, "fsdp": 1, "tensor": 8}),
    ],
)
def test_devices_that_the_heads_cannot_use_hold_copies(heads, kv_heads, flags, expected):
    mesh = decoding_mesh(flags, tiny_arch(heads=heads, kv_heads=kv_heads, width=8 * heads))
    assert mesh is not None
    assert dict(mesh.shape) == expected


def test_a_cache_of_heads_that_divide_keeps_the_mesh_of_its_network():
    one = network(4, data=2, tensor=4)
    assert cache_sharding(one).mesh == one.layout.mesh
    assert cache_sharding(one).spec == PartitionSpec(("data", "fsdp"), "tensor", None, None)
