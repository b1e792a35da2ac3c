"""Meshes, the path table, padding of the vocabulary, and where the bytes are."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ivl_jax.sharding import (
    LAYOUTS,
    ShardingRules,
    activation_constraint,
    arrange_slices,
    bytes_per_device,
    data_shard,
    fit_sizes,
    logical_axes,
    make_mesh,
    padded_vocab_rows,
    parameter_shardings,
    place_batch,
    single_device_mesh,
)

UNTIED_SHAPES = {
    "embed_tokens": {"embedding": (64, 16)},
    "layers": {
        0: {
            "self_attn": {
                "q_proj": {"kernel": (16, 32), "bias": (32,)},
                "k_proj": {"kernel": (16, 8), "bias": (8,)},
                "v_proj": {"kernel": (16, 8), "bias": (8,)},
                "o_proj": {"kernel": (32, 16)},
            },
            "mlp": {"down_proj": {"kernel": (48, 16)}},
            "input_layernorm": {"scale": (16,)},
        }
    },
    "norm": {"scale": (16,)},
    "lm_head": {"kernel": (16, 64)},
}


def abstract(shapes):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def test_minus_one_takes_all_devices_that_are_left():
    assert dict(make_mesh(fsdp=-1, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(make_mesh(data=-1).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert single_device_mesh().size == 1


def test_mesh_axes_are_auto():
    assert all(kind == jax.sharding.AxisType.Auto for kind in make_mesh(fsdp=8).axis_types)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of one of several slices; as much as arranging them reads."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    client: None = None

    @property
    def process_index(self):
        return self.id // 4


def two_slices(**fields):
    """Two slices of 2 × 4 chips, mixed up."""
    return [
        FakeDevice(8 * part + 4 * y + x, part, (x, y, 0), **fields)
        for y in range(2)
        for x in range(4)
        for part in (1, 0)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 8, "tensor": 1},
        {"data": 4, "fsdp": 2, "tensor": 2},
        {"data": 16, "fsdp": 1, "tensor": 1},
    ],
)
def test_only_data_spans_the_slices_of_a_tpu(sizes):
    devices = arrange_slices(two_slices(), sizes)
    assert devices.shape == tuple(sizes.values())
    assert len({device.id for device in devices.flat}) == 16
    for part, of_data in enumerate(np.split(devices, 2)):
        assert {device.slice_index for device in of_data.flat} == {part}


def test_a_tpu_of_two_slices_refuses_sizes_that_span_them_and_names_others():
    with pytest.raises(ValueError, match=r"16 devices in 2 slices \(data must be a mul") as error:
        fit_sizes({"data": 1, "fsdp": -1, "tensor": 1}, two_slices())
    assert "these sizes do: data=2, fsdp=8, tensor=1; " in str(error.value)
    wanted = {"data": 2, "fsdp": -1, "tensor": 1}
    assert fit_sizes(wanted, two_slices()) == {"data": 2, "fsdp": 8, "tensor": 1}


def test_gpus_of_two_hosts_may_have_any_axis_between_them():
    gpus = two_slices(platform="gpu", device_kind="NVIDIA H100")
    sizes = fit_sizes({"data": 1, "fsdp": -1, "tensor": 1}, gpus)
    assert [device.id for device in arrange_slices(gpus, sizes).flat] == list(range(16))


def test_every_device_of_several_processes_is_used():
    with pytest.raises(ValueError, match=r"does not fit 16 devices; these sizes do: data=2, fsdp"):
        fit_sizes({"data": 2, "fsdp": 2, "tensor": 2}, two_slices(platform="gpu"))


@pytest.mark.parametrize("sizes", [{"data": 16}, {"fsdp": -1, "tensor": 3}, {"data": 0}])
def test_sizes_that_do_not_fit_the_devices_are_an_error_that_names_them(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(**sizes)


def test_a_mesh_smaller_than_the_machine_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        make_mesh(data=2)
    assert "uses 2 of 8 devices" in caplog.text


def test_each_matrix_is_split_by_fsdp_and_tensor():
    shardings = parameter_shardings(abstract(UNTIED_SHAPES), make_mesh(data=2, fsdp=2, tensor=2))
    layer = shardings["layers"][0]
    assert shardings["embed_tokens"]["embedding"].spec == P("tensor", "fsdp")
    assert shardings["lm_head"]["kernel"].spec == P("fsdp", "tensor")
    assert layer["self_attn"]["q_proj"]["kernel"].spec == P("fsdp", "tensor")
    assert layer["self_attn"]["o_proj"]["kernel"].spec == P("tensor", "fsdp")
    assert layer["self_attn"]["k_proj"]["bias"].spec == P("tensor")
    assert layer["input_layernorm"]["scale"].spec == P(None)


def test_stacked_layers_have_the_same_axes_behind_a_whole_layer_dimension():
    assert logical_axes("layers.mlp.up_proj.kernel", 3) == (None, "embed", "mlp")
    assert logical_axes("layers.11.mlp.up_proj.kernel", 2) == ("embed", "mlp")


@pytest.mark.parametrize(
    ("path", "ndim"), [("layers.0.mlp.router.kernel", 2), ("norm.scale", 2), ("embedding", 2)]
)
def test_an_unknown_parameter_path_is_an_error_that_names_it(path, ndim):
    with pytest.raises(ValueError, match=path):
        logical_axes(path, ndim)


def test_a_dimension_that_does_not_divide_is_replicated_with_one_notice(caplog):
    shapes = {"mlp": {"up_proj": {"kernel": (16, 30)}, "down_proj": {"kernel": (30, 16)}}}
    with caplog.at_level(logging.WARNING):
        shardings = parameter_shardings(
            abstract({"layers": {0: shapes, 1: shapes}}), make_mesh(fsdp=2, tensor=4)
        )
    assert shardings["layers"][0]["mlp"]["up_proj"]["kernel"].spec == P("fsdp", None)
    assert len(caplog.records) == 1
    assert "layers.*.mlp.up_proj.kernel dim 1 (size 30) over tensor=4, 2 times" in caplog.text
    assert "layers.*.mlp.down_proj.kernel dim 0 (size 30) over tensor=4, 2 times" in caplog.text


def test_no_head_is_cut_in_two(caplog):
    shapes = {"layers": {0: {"self_attn": {"k_proj": {"kernel": (16, 32)}}}}}
    with caplog.at_level(logging.WARNING):
        shardings = parameter_shardings(
            abstract(shapes), make_mesh(tensor=8), units={"heads": 8, "kv_heads": 4}
        )
    assert shardings["layers"][0]["self_attn"]["k_proj"]["kernel"].spec == P(None, None)
    assert "4 kv_heads" in caplog.text


def test_layouts_of_base_and_value_may_differ_on_one_mesh():
    mesh = make_mesh(fsdp=4, tensor=2)
    specs = {
        name: parameter_shardings(abstract(UNTIED_SHAPES), mesh, rules)["lm_head"]["kernel"].spec
        for name, rules in LAYOUTS.items()
    }
    assert specs == {
        "full": P("fsdp", "tensor"),
        "fsdp": P("fsdp", None),
        "tensor": P(None, "tensor"),
        "replicated": P(None, None),
    }


def test_rules_that_would_split_a_matrix_twice_by_one_axis_are_an_error():
    with pytest.raises(ValueError, match=r"tensor.*mlp"):
        ShardingRules(embed="tensor")
    with pytest.raises(ValueError, match="not one of"):
        ShardingRules(mlp="model")


def test_vocabulary_rows_are_equal_on_every_usual_mesh():
    wide, narrow = make_mesh(tensor=8), single_device_mesh()
    assert padded_vocab_rows(50257, narrow) == padded_vocab_rows(50257, wide) == 50304
    assert padded_vocab_rows(32000, wide) == 32000
    devices = jax.devices()[:3]
    assert padded_vocab_rows(64, make_mesh(tensor=3, devices=devices)) == 192


def test_each_device_holds_only_its_share_of_the_bytes():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shapes = {"lm_head": {"kernel": (16, 64)}}
    shardings = parameter_shardings(abstract(shapes), mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), sharding),
        abstract(shapes),
        shardings,
    )
    assert bytes_per_device(params) == {device.id: 16 * 64 * 4 // 4 for device in jax.devices()}


def test_a_placed_batch_is_split_by_rows_and_keeps_its_values():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows = {"tokens": np.arange(8 * 3, dtype=np.int32).reshape(8, 3)}
    placed = place_batch(rows, mesh)["tokens"]
    np.testing.assert_array_equal(np.asarray(placed), rows["tokens"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    micro = place_batch({"tokens": rows["tokens"].reshape(2, 4, 3)}, mesh, micro_batched=True)
    assert {shard.data.shape for shard in micro["tokens"].addressable_shards} == {(2, 1, 3)}


def test_one_process_reads_the_whole_batch():
    assert data_shard(make_mesh(data=4, tensor=2)) == (0, 1)


def test_activations_are_split_by_rows_and_heads_where_they_divide():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    constrain = activation_constraint(mesh)
    names = ("batch", "length", "heads", "head_dim")

    def spec(shape, axes):
        return jax.jit(lambda x: constrain(x, axes))(jnp.zeros(shape)).sharding.spec

    assert spec((4, 5, 2, 8), names) == P(("data", "fsdp"), None, "tensor")
    assert spec((4, 5, 3, 8), names) == P(("data", "fsdp"))
    assert spec((1, 5, 2, 8), names) == P(None, None, "tensor")
    assert spec((4, 5, 8), ("batch", "length", "embed")) == P(("data", "fsdp"))
