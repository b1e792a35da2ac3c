"""Weights that hold NaN or infinity are refused where they are read, by file and tensor."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ivl_jax.finite_arrays import NonFiniteWeightsError, check_finite, count_non_finite
from ivl_jax.model.projection import KernelForm
from ivl_jax.sharding import make_mesh, replicated
from ivl_jax.weights.hf_checkpoint import load_params
from tests.weights.conftest import TINY

DTYPES = [np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (300, 1000)], ids=str)
def test_what_is_not_finite_is_counted_whatever_its_bits(dtype, shape):
    limits = ml_dtypes.finfo(dtype)
    rng = np.random.default_rng(0)
    array = rng.standard_normal(shape).astype(dtype)
    flat = array.reshape(-1)
    extremes = [limits.max, limits.min, limits.smallest_subnormal, -limits.smallest_subnormal, -0.0]
    flat[: len(extremes)] = extremes
    assert count_non_finite(array) == 0
    # Quiet and signalling NaNs of both signs: all bits, and the lowest alone, above an infinity's.
    bits = np.asarray(np.inf, dtype).view(f"u{dtype.itemsize}")
    sign = np.asarray(-0.0, dtype).view(f"u{dtype.itemsize}")
    strange = [bits, bits | sign, bits | 1, bits | sign | 1, ~(bits & 0)]
    for count, one in enumerate(strange, 1):
        flat.view(f"u{dtype.itemsize}")[-count] = one
        assert count_non_finite(array) == count
        assert count_non_finite(array.T) == count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.weight"],
)
def test_loading_names_file_and_tensor(arch, tensors, write_folder, dtype, number, name):
    tensors = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
    tensors[name][3, 2:4] = number
    folder = write_folder({"model.safetensors": tensors})
    expected = f"{folder}/model.safetensors: {name}: expected finite numbers, found 2 "
    with pytest.raises(NonFiniteWeightsError, match=re.escape(expected)):
        load_params(folder, arch)


@pytest.mark.parametrize("form", [KernelForm(rows=True), KernelForm(rows=True, int8=True)], ids=str)
def test_loading_for_decoding_names_the_tensor_inside_a_fused_kernel(
    arch, tensors, write_folder, form
):
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = np.nan
    folder = write_folder({"model.safetensors": tensors})
    with pytest.raises(NonFiniteWeightsError, match=r"layers\.0\.self_attn\.v_proj\.weight: .* 1 "):
        load_params(folder, arch, form=form)


def test_loading_onto_a_mesh_finds_it_in_whichever_slice_it_is(arch, tensors, write_folder):
    from ivl_jax.model.decoder import abstract_params
    from ivl_jax.sharding import parameter_shardings

    assert TINY["vocab_size"] == 40
    tensors["lm_head.weight"][39, 15] = -np.inf
    folder = write_folder({"model.safetensors": tensors})
    mesh = make_mesh(tensor=4, fsdp=2)
    shardings = parameter_shardings(abstract_params(arch), mesh)
    with pytest.raises(NonFiniteWeightsError, match=r"lm_head\.weight"):
        load_params(folder, arch, shardings=shardings)


def test_arrays_on_devices_are_named_all_at_once():
    whole = replicated(make_mesh(fsdp=8))
    broken = jnp.asarray([1.0, np.nan, np.inf])
    arrays = {
        "fine": jnp.ones(3),
        "one": broken,
        "copied": jax.device_put(broken, whole),
        "half": broken.astype(jnp.bfloat16),
    }
    with pytest.raises(NonFiniteWeightsError) as caught:
        check_finite(arrays, what="the model", remedy="mend it")
    first, *named, last = str(caught.value).splitlines()
    assert (first, last) == ("the model cannot be used:", "mend it")
    # A copy on every device counts once.
    assert [line.split(":")[0].strip(" -") for line in named] == ["one", "copied", "half"]
    assert all("found 2 that are NaN or infinite" in line for line in named)
    many = {f"array {i}": broken for i in range(23)}
    with pytest.raises(NonFiniteWeightsError, match="and 3 more"):
        check_finite(many, what="the model", remedy="mend it")


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_value_folder_names_its_arrays(tmp_path: Path, on_mesh):
    from ivl_jax.assets import family_folder
    from ivl_jax.checkpoint import load_value, save_value
    from ivl_jax.weights.language_model import load_language_model
    from tests.decoding.conftest import make_value
    from tests.decoding.tiny import tiny_arch

    arch = tiny_arch(layers=2, rows=2048)
    value = make_value(load_language_model(family_folder("S")), arch=arch)
    value.params["layers"][1]["mlp"]["up_proj"]["kernel"] = (
        value.params["layers"][1]["mlp"]["up_proj"]["kernel"].at[2, 5].set(jnp.nan)
    )
    folder = tmp_path / "value"
    save_value(folder, params=value.params, metadata=value.metadata, tokenizer=value.tokenizer)
    mesh = make_mesh(fsdp=8) if on_mesh else None
    with pytest.raises(NonFiniteWeightsError) as caught:
        load_value(folder, mesh=mesh)
    assert f"the value network in {folder} cannot be used" in str(caught.value)
    assert "layers.1.mlp.up_proj.kernel: expected finite numbers, found 1" in str(caught.value)
