import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from ivl_jax.finite_arrays import NonFiniteWeightsError
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import (
    abstract_params,
)
from ivl_jax.sharding import bytes_per_device, make_mesh, parameter_shardings, replicated
from ivl_jax.tree_compare import TreeMismatchError
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_saving import save_params
from tests.weights.equality import assert_equal_bits

SINGLE = "model.safetensors"
Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


def _expected(tensors: Tensors, path: tuple[Any, ...]) -> np.ndarray:
    """The parameter at a path, said here a second time and by hand."""
    *modules, leaf = path
    root = "" if modules[0] == "lm_head" else "model."
    array = tensors[root + ".".join(map(str, modules)) + ".weight"]
    return array.T if leaf == "kernel" else array


def test_every_tensor_lands_in_its_place(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    params = traverse_util.flatten_dict(load_params(write_folder({SINGLE: tensors}), arch))
    assert len(params) == len(tensors)
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, _expected(tensors, path), err_msg=str(path))
    assert jax.tree.structure(traverse_util.unflatten_dict(params)) == jax.tree.structure(
        abstract_params(arch)
    )


def test_shards_give_what_one_file_gives(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    single = load_params(write_folder({SINGLE: tensors}, name="single"), arch)
    names = sorted(tensors)
    shards = {
        f"model-{part}.safetensors": {name: tensors[name] for name in names[part::3]}
        for part in range(3)
    }
    assert_equal_bits(load_params(write_folder(shards, name="sharded"), arch), single)


def test_one_entry_is_read_alone_from_a_folder_that_is_checked_whole(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    folder = write_folder({SINGLE: tensors}, name="whole")
    whole = load_params(folder, arch)
    assert_equal_bits(load_params(folder, arch, entries=("norm",)), {"norm": whole["norm"]})
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(TreeMismatchError, match="up_proj"):
        load_params(write_folder({SINGLE: tensors}, name="broken"), arch, entries=("norm",))


def test_everything_that_does_not_fit_is_listed_in_one_error(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 8), np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["model.norm.weight"] = np.zeros(16, np.float64)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 16), np.int8)
    folder = write_folder({SINGLE: tensors})
    with pytest.raises(TreeMismatchError) as error:
        load_params(folder, arch)
    message = str(error.value)
    for line in (
        "model.layers.1.mlp.up_proj.weight: expected [24, 16], got nothing",
        "model.layers.0.self_attn.q_proj.weight: expected [16, 16], got [16, 8]",
        "model.layers.2.mlp.up_proj.weight: expected nothing, got [24, 16]",
        "model.norm.weight: expected one of F32, BF16, F16, got F64",
        "model.layers.0.mlp.up_proj.weight: expected one of F32, BF16, F16, got I8",
        str(folder),
        "Check that weights and config.json belong to the same model",
    ):
        assert line in message
    assert message.count("expected") == 5


def test_at_most_twenty_mismatches_are_listed(arch: ArchConfig, write_folder: Write) -> None:
    with pytest.raises(TreeMismatchError) as error:
        load_params(write_folder({SINGLE: {"model.norm.weight": np.zeros(16, "f4")}}), arch)
    assert str(error.value).count("got nothing") == 20
    bigger = dataclasses.replace(arch, num_hidden_layers=4, layer_types=("full_attention",) * 4)
    with pytest.raises(TreeMismatchError, match="and 18 more") as error:
        load_params(write_folder({SINGLE: {"model.norm.weight": np.zeros(16, "f4")}}), bigger)
    assert str(error.value).count("got nothing") == 20


def test_rotary_tables_of_old_files_are_known_and_harmless(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    plain = load_params(write_folder({SINGLE: tensors}, name="plain"), arch)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(2, np.float32)
    assert_equal_bits(load_params(write_folder({SINGLE: tensors}, name="old"), arch), plain)


def test_a_tied_head_stored_again_must_have_the_same_bits(
    tied_arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    params = load_params(write_folder({SINGLE: tensors}), tied_arch)
    assert "lm_head" not in params
    tensors["lm_head.weight"].view(np.uint8)[39, 60] ^= 1
    with pytest.raises(TreeMismatchError, match=r"lm_head\.weight: expected the same bits"):
        load_params(write_folder({SINGLE: tensors}), tied_arch)


def test_a_head_that_is_missing_names_the_remedy(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    del tensors["lm_head.weight"]
    with pytest.raises(TreeMismatchError, match=r"lm_head\.weight: .*\n.*tie_word_embeddings"):
        load_params(write_folder({SINGLE: tensors}), arch)


@pytest.mark.parametrize(
    "prefixes", [("language_model.model.", "language_model."), ("model.language_model.", "")]
)
def test_gemma3_text_is_read_out_of_a_multimodal_file(
    tied_arch: ArchConfig,
    tensors: Tensors,
    write_folder: Write,
    prefixes: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    del tensors["lm_head.weight"]
    plain = load_params(write_folder({SINGLE: tensors}, name="plain"), tied_arch)
    wrapped = {prefixes[0] + name.removeprefix("model."): x for name, x in tensors.items()}
    wrapped["vision_tower.post_layernorm.weight"] = np.ones(3, np.float32)
    folder = write_folder({SINGLE: wrapped}, name="multimodal")
    gemma = dataclasses.replace(tied_arch, model_type="gemma3_text")
    assert_equal_bits(load_params(folder, gemma), plain)
    assert "ignored 1 tensors of its image encoder" in caplog.text
    with pytest.raises(TreeMismatchError, match=r"vision_tower.*expected nothing"):
        load_params(folder, tied_arch)  # a Llama has no image encoder


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_converted_with_one_rounding(
    arch: ArchConfig, tensors: Tensors, write_folder: Write, stored: Any, wanted: Any
) -> None:
    tensors = {name: array.astype(stored) for name, array in tensors.items()}
    folder = write_folder({SINGLE: tensors})
    params = traverse_util.flatten_dict(load_params(folder, arch, param_dtype=wanted))
    for path, leaf in params.items():
        expected = _expected(tensors, path).astype(wanted)
        assert leaf.dtype == wanted
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=str(path))


def test_other_parameter_dtypes_are_refused(
    arch: ArchConfig, tensors: Tensors, write_folder: Write, tmp_path: Path
) -> None:
    folder = write_folder({SINGLE: tensors})
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got int8"):
        load_params(folder, arch, param_dtype=jnp.int8)
    with pytest.raises(ValueError, match="expected float32 or bfloat16, got int8"):
        save_params(tmp_path / "x", arch, load_params(folder, arch), dtype=jnp.int8)


@pytest.mark.parametrize("largest", [65_504.0, 70_000.0])
def test_weights_too_large_for_float16_are_refused_in_it(
    arch: ArchConfig, tensors: Tensors, write_folder: Write, largest: float
) -> None:
    norm = np.full_like(tensors["model.norm.weight"], largest)
    folder = write_folder({SINGLE: tensors | {"model.norm.weight": norm}})
    assert float(load_params(folder, arch)["norm"]["scale"][0]) == largest
    if largest <= 65_504:
        load_params(folder, arch, param_dtype=jnp.float16)
        return
    message = f"float16, which ends at 65,504: norm.scale has {norm.size} larger numbers"
    with pytest.raises(NonFiniteWeightsError, match=message):
        load_params(folder, arch, param_dtype=jnp.float16)


def test_padded_vocabulary_rows_are_zero_and_saving_crops_them(
    arch: ArchConfig, tensors: Tensors, write_folder: Write, tmp_path: Path
) -> None:
    params = load_params(write_folder({SINGLE: tensors}), arch, vocab_rows=64)
    embedding, head = params["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
    assert embedding.shape == (64, 16)
    assert head.shape == (16, 64)
    np.testing.assert_array_equal(embedding[:40], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(head[:, :40], tensors["lm_head.weight"].T)
    assert not np.any(embedding[40:])
    assert not np.any(head[:, 40:])
    save_params(tmp_path / "saved", arch, params, dtype=jnp.float32)
    saved = load_file(tmp_path / "saved" / SINGLE)
    assert {name: array.tobytes() for name, array in saved.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
    exact = load_params(tmp_path / "saved", arch, vocab_rows=40)
    np.testing.assert_array_equal(exact["embed_tokens"]["embedding"], embedding[:40])
    with pytest.raises(ValueError, match="at least the vocabulary, 40, got 39"):
        load_params(write_folder({SINGLE: tensors}), arch, vocab_rows=39)


@pytest.mark.parametrize("layout", [(1, 2, 4), (2, 4, 1), (1, 1, 8), (8, 1, 1)])
def test_every_device_gets_only_its_slice(
    arch: ArchConfig,
    tensors: Tensors,
    write_folder: Write,
    layout: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_folder({SINGLE: tensors})
    whole = load_params(folder, arch, vocab_rows=64)
    data, fsdp, tensor = layout
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    shardings = parameter_shardings(abstract_params(arch, vocab_rows=64), mesh)
    moved: list[int] = []
    device_put = jax.device_put

    def spy(array: np.ndarray, *args: Any) -> jax.Array:
        moved.append(array.nbytes)
        return device_put(array, *args)

    monkeypatch.setattr(jax, "device_put", spy)
    params = load_params(folder, arch, vocab_rows=64, shardings=shardings)
    monkeypatch.undo()
    assert_equal_bits(params, whole)
    expected = sum(
        int(np.prod(sharding.shard_shape(leaf.shape))) * 4
        for leaf, sharding in zip(jax.tree.leaves(whole), jax.tree.leaves(shardings), strict=True)
    )
    assert bytes_per_device(params) == {device.id: expected for device in jax.devices()}
    assert sum(moved) == 8 * expected
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, params, shardings))


def test_a_slice_reads_only_its_rows(
    arch: ArchConfig, tensors: Tensors, write_folder: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder({SINGLE: tensors})
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    shardings = parameter_shardings(abstract_params(arch), mesh)
    mine = jax.devices()[0]
    # As in a process that has only the first of the two devices.
    monkeypatch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {mine: self.devices_indices_map(shape)[mine]},
    )
    seen: list[int] = []

    def stop(shape: Any, sharding: Any, shards: list[jax.Array]) -> jax.Array:
        return shards[0]

    preadv = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        seen.append(preadv(descriptor, buffers, offset))
        return seen[-1]

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", stop)
    monkeypatch.setattr(os, "preadv", count)
    params = load_params(folder, arch, shardings=shardings)
    half = params["layers"][0]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(half, tensors["model.layers.0.self_attn.q_proj.weight"].T[:, :8])
    total = sum(array.nbytes for array in tensors.values())
    row_split = sum(
        array.nbytes
        for name, array in tensors.items()
        if array.ndim == 2 and "o_proj" not in name and "down_proj" not in name
    )
    assert sum(seen) == total - row_split // 2


def test_donating_a_replicated_parameter_leaves_its_other_copies_alone(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    # On CPU all copies are the same host memory: an update in place would add 1 eight times.
    sharding = replicated(make_mesh(data=8))
    shardings = jax.tree.map(lambda _: sharding, abstract_params(arch))
    params = load_params(write_folder({SINGLE: tensors}), arch, shardings=shardings)
    embedding = params["embed_tokens"]["embedding"]
    added = jax.jit(lambda x: x + 1, donate_argnums=0)(embedding)
    for shard in added.addressable_shards:
        np.testing.assert_array_equal(shard.data, tensors["model.embed_tokens.weight"] + 1)


def test_shardings_of_another_tree_are_an_error(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    shardings = parameter_shardings(abstract_params(arch), make_mesh(fsdp=8))
    folder = write_folder({SINGLE: tensors})
    shardings["final_norm"] = shardings.pop("norm")
    with pytest.raises(ValueError, match="2 of them in only one of the trees"):
        load_params(folder, arch, shardings=shardings)
    del shardings["final_norm"]
    with pytest.raises(ValueError, match="1 of them in only one of the trees"):
        load_params(folder, arch, shardings=shardings)


def test_the_callers_default_device_is_used(
    arch: ArchConfig, tensors: Tensors, write_folder: Write
) -> None:
    with jax.default_device(jax.devices()[3]):
        params = load_params(write_folder({SINGLE: tensors}), arch)
    assert {leaf.device.id for leaf in jax.tree.leaves(params)} == {3}
    assert not any(leaf.committed for leaf in jax.tree.leaves(params))


MEASURE = """
import json, sys
from pathlib import Path
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params
from ivl_jax.weights.hf_checkpoint import load_params
import jax

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

arch = ArchConfig.from_hf(json.loads(Path(sys.argv[1], "config.json").read_text()))
abstract_params(arch), jax.block_until_ready(jax.device_put(0.0))  # JAX's own memory comes first
before = peak()
params = load_params(sys.argv[1], arch)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"size": size, "grown": peak() - before}))
"""


def test_loading_holds_one_copy_of_the_parameters(tmp_path: Path, project_root: Path) -> None:
    arch = ArchConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 8_192,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
        }
    )
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(arch))
    save_params(tmp_path / "big", arch, params, dtype=jnp.float32)
    del params
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big")],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    assert measured["size"] > 150e6
    assert measured["grown"] < 1.1 * measured["size"]
