"""A LoRA value folder: an adapter, bound to its model by fingerprint, merged when it is read."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.checkpoint import ValueFolderError, load_value, read_value_metadata, save_value
from ivl_jax.checkpoint.arrays import stored_leaves
from ivl_jax.checkpoint.value_arrays import load_adapter, lora_of
from ivl_jax.manifest import write_manifest
from ivl_jax.model.decoder import init_params, stack_layers
from ivl_jax.model.lora import init_adapter, join, merge
from ivl_jax.model.projection import Lora
from ivl_jax.sharding import make_mesh
from ivl_jax.tree_compare import TreeMismatchError
from ivl_jax.weights.fingerprint import weights_fingerprint
from ivl_jax.weights.hf_saving import save_params

LORA = Lora(rank=4, alpha=8.0, targets="all-linear")


@pytest.fixture(scope="module")
def model(tmp_path_factory, arch, params, tokenizer) -> Path:
    """The frozen model's folder."""
    folder = tmp_path_factory.mktemp("adapted") / "model"
    save_params(folder, arch, params, dtype=jnp.float32)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(arch):
    """A trained adapter: B is not zero."""
    zero = init_adapter(arch, LORA, jax.random.key(2))
    return jax.tree.map(lambda leaf: leaf if leaf.any() else leaf + 0.25, zero)


@pytest.fixture
def adapted(metadata, model):
    """The metadata of a LoRA value folder."""
    record = {"name": str(model), "revision": None, "fingerprint": weights_fingerprint(model)}
    return dataclasses.replace(metadata, adapter=dataclasses.asdict(LORA) | {"model": record})


@pytest.fixture
def folder(tmp_path, adapter, adapted, tokenizer) -> Path:
    """A LoRA value folder."""
    save_value(tmp_path / "value", params=adapter, metadata=adapted, tokenizer=tokenizer)
    return tmp_path / "value"


def edit(folder: Path, change) -> None:
    path = folder / "ivl.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    write_manifest(folder, {})


def test_the_folder_has_the_adapter_only_and_names_its_model(folder, adapted, adapter, params):
    assert read_value_metadata(folder) == adapted
    assert json.loads((folder / "ivl.json").read_text())["format_version"] == 3
    names = stored_leaves(folder / "params")
    assert {name.rsplit(".", 1)[1] for name in names} == {"lora_a", "lora_b"}
    jax.tree.map(
        np.testing.assert_array_equal, load_adapter(folder, adapted, shardings=None), adapter
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_merges_into_the_model_in_float32(folder, adapter, params, dtype):
    value = load_value(folder, param_dtype=jnp.dtype(dtype))
    expected = merge(join(adapter, params), LORA, dtype=jnp.dtype(dtype))
    jax.tree.map(np.testing.assert_array_equal, value.params, expected)
    assert value.metadata.adapter is None, "it is a whole network now"
    changed = np.asarray(value.params["layers"][0]["mlp"]["up_proj"]["kernel"], np.float32)
    assert np.abs(changed - params["layers"][0]["mlp"]["up_proj"]["kernel"]).max() > 0.1


def test_a_merged_value_is_saved_as_a_plain_folder(folder, tmp_path, model):
    value = load_value(folder)
    out = tmp_path / "plain"
    save_value(out, params=value.params, metadata=value.metadata, tokenizer=value.tokenizer)
    content = json.loads((out / "ivl.json").read_text())
    assert content["format_version"] == 2
    assert "adapter" not in content
    jax.tree.map(np.testing.assert_array_equal, load_value(out).params, value.params)


def test_stacked_layers_are_stored_unstacked_and_a_mesh_reads_the_same(
    tmp_path, adapter, adapted, tokenizer, folder
):
    save_value(tmp_path / "v", params=stack_layers(adapter), metadata=adapted, tokenizer=tokenizer)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    sharded, whole = load_value(tmp_path / "v", mesh=mesh).params, load_value(folder).params
    up = sharded["layers"][1]["mlp"]["up_proj"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (16, 32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a)[tuple(map(slice, b.shape))], b, rtol=1e-6, atol=1e-6
        ),
        sharded,
        whole,
    )


def test_a_model_that_has_moved_is_found_where_the_option_says(folder, model, tmp_path):
    edit(folder, lambda content: content["adapter"]["model"].update(name="/no/such/model"))
    with pytest.raises(
        FileNotFoundError, match=r"only an adapter of /no/such/model.*--value-model"
    ):
        load_value(folder)
    value = load_value(folder, value_model=model)
    np.testing.assert_array_equal(value.params["norm"]["scale"], 1.0)


def test_another_model_is_refused_with_both_fingerprints(folder, arch, adapted, tmp_path):
    other = tmp_path / "other"
    save_params(other, arch, init_params(arch, jax.random.key(9)), dtype=jnp.float32)
    expected = adapted.adapter["model"]["fingerprint"]
    found = weights_fingerprint(other)
    with pytest.raises(ValueFolderError) as raised:
        load_value(folder, value_model=other)
    text = str(raised.value)
    assert f"expected the fingerprint {expected}" in text
    assert f"{other}: {found}" in text
    assert "--value-model" in text


def test_whole_parameters_are_not_saved_as_an_adapter(tmp_path, params, adapted, tokenizer):
    with pytest.raises(TreeMismatchError, match=r"lora_a: expected .*got nothing"):
        save_value(tmp_path / "v", params=params, metadata=adapted, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(rank=0), "adapter.rank: expected a positive count, got 0"),
        (lambda a: a.update(targets="head"), "adapter.targets: expected one of all-linear"),
        (lambda a: a.pop("model"), "adapter.model: missing"),
        (lambda a: a["model"].update(fingerprint=3), "adapter.model.fingerprint: expected text"),
    ],
)
def test_an_invalid_record_of_the_adapter_is_named(folder, change, message):
    edit(folder, lambda content: change(content["adapter"]))
    with pytest.raises(ValueFolderError, match=message):
        load_value(folder)


def test_a_folder_of_a_whole_network_has_no_record_of_an_adapter(folder):
    edit(folder, lambda content: content.update(format_version=2))
    with pytest.raises(ValueFolderError, match="adapter: unknown"):
        load_value(folder)


def test_lora_of_a_whole_network_is_none(metadata, adapted):
    assert lora_of(metadata) is None
    assert lora_of(adapted) == LORA
