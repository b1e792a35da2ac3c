"""Parameters loaded in the form they decode in are those that were laid out after loading."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from ivl_jax.composed.kernel_form import loading_form
from ivl_jax.decoding.compose import compose
from ivl_jax.decoding.requests import GenerationOptions
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decode_layout import to_decode_layout
from ivl_jax.model.decoder import Params, abstract_params
from ivl_jax.model.int8 import quantize
from ivl_jax.model.projection import KernelForm
from ivl_jax.sharding import bytes_per_device, make_mesh, parameter_shardings
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_saving import save_params
from ivl_jax.weights.language_model import load_language_model
from tests.model.families import random_params, tiny_arch

ROWS, INT8, ROWS_INT8 = KernelForm(rows=True), KernelForm(int8=True), KernelForm(True, True)


def laid_out(params: Params, form: KernelForm) -> Params:
    params = to_decode_layout(params) if form.rows else params
    return quantize(params, rows=form.rows) if form.int8 else params


def assert_same(found: Params, expected: Params) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype, path
        # A compiled division may differ in a scale's last bit, and so round a weight elsewhere.
        tolerance = 1 if one.dtype == jnp.int8 else 1e-6 * float(jnp.max(jnp.abs(other)) + 1e-9)
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=0, err_msg=str(path))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama_bias", ROWS),
        ("llama_bias", INT8),
        ("llama_bias", ROWS_INT8),
        ("qwen3", ROWS_INT8),
        ("gemma2", ROWS_INT8),
        pytest.param("qwen3", ROWS, marks=pytest.mark.slow),
        pytest.param("qwen3", INT8, marks=pytest.mark.slow),
        pytest.param("gemma2", ROWS, marks=pytest.mark.slow),
        pytest.param("gemma2", INT8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_form_is_the_one_made_after_loading(name, form, tmp_path):
    arch = tiny_arch(name)
    save_params(tmp_path / "model", arch, random_params(arch), dtype=jnp.float32)
    found = load_params(tmp_path / "model", arch, form=form, vocab_rows=arch.vocab_size + 3)
    shapes = abstract_params(arch, form=form, vocab_rows=arch.vocab_size + 3)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [
        leaf.shape for leaf in jax.tree.leaves(shapes)
    ]
    plain = load_params(tmp_path / "model", arch, vocab_rows=arch.vocab_size + 3)
    assert_same(found, laid_out(plain, form))


def test_projections_of_other_dtypes_and_files_are_fused_all_the_same(tmp_path):
    arch = tiny_arch("llama_bias")
    save_params(tmp_path / "model", arch, random_params(arch), dtype=jnp.float32)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    keys = "model.layers.1.self_attn.k_proj"
    apart = {f"{keys}.{leaf}": tensors.pop(f"{keys}.{leaf}") for leaf in ("weight", "bias")}
    apart = {name: array.astype(bfloat16) for name, array in apart.items()}
    for part, group in enumerate((tensors, apart), 1):
        save_file(group, tmp_path / "model" / f"model-{part}.safetensors")
    weight_map = {
        name: f"model-{part}.safetensors"
        for part, group in enumerate((tensors, apart), 1)
        for name in group
    }
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plain = load_params(tmp_path / "model", arch)
    assert_same(load_params(tmp_path / "model", arch, form=ROWS), laid_out(plain, ROWS))


def test_int8_kernels_on_a_mesh_are_split_with_their_scales(tmp_path):
    arch = tiny_arch("llama3")
    save_params(tmp_path / "model", arch, random_params(arch), dtype=jnp.float32)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shapes = abstract_params(arch, form=INT8, vocab_rows=128)
    shardings = parameter_shardings(shapes, mesh)
    found = load_params(tmp_path / "model", arch, form=INT8, vocab_rows=128, shardings=shardings)
    alone = load_params(tmp_path / "model", arch, form=INT8, vocab_rows=128)
    assert_same(found, alone)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings
    kernel = found["layers"][0]["mlp"]["down_proj"]["kernel"]
    assert set(bytes_per_device(kernel).values()) == {kernel.nbytes // 4}
    with pytest.raises(ValueError, match="are for a single device: expected no shardings"):
        load_params(tmp_path / "model", arch, form=ROWS, shardings=shardings)


@pytest.mark.parametrize("int8", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_loaded_for_decoding_says_what_the_other_says(stories260k_dir, int8, tmp_path):
    plain = load_language_model(stories260k_dir)
    ready = load_language_model(stories260k_dir, form=loading_form(None, int8=int8))
    options = GenerationOptions(max_new_tokens=24)
    models = [compose(base, ready, strengths=[0.5], int8_base=int8) for base in (plain, ready)]
    texts = [model.generate(["Once upon"], options) for model in models]
    assert texts[0] == texts[1]
    # What lies as it decodes is not moved.
    kernel = models[1].params.base["layers"][0]["mlp"]["down_proj"]["kernel"]
    with pytest.raises(ValueError, match="save the model as it was loaded"):
        save_params(tmp_path / "again", ready.arch, models[1].params.base, dtype=jnp.float32)
    assert kernel is ready.params["layers"][0]["mlp"]["down_proj"]["kernel"]


MEASURE = """
import json, sys
from pathlib import Path
from ivl_jax.composed.kernel_form import lay_out_network, loading_form
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params
from ivl_jax.weights.hf_checkpoint import load_params
import jax

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

arch = ArchConfig.from_hf(json.loads(Path(sys.argv[1], "config.json").read_text()))
form = loading_form(None, int8=sys.argv[2] == "int8")
abstract_params(arch), jax.block_until_ready(jax.device_put(0.0))  # JAX's own memory comes first
before = peak()
params = lay_out_network(load_params(sys.argv[1], arch, form=form), arch, None)[1]
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"size": size, "grown": peak() - before}))
"""


@pytest.mark.parametrize("kernels", [pytest.param("float", marks=pytest.mark.slow), "int8"])
def test_loading_for_decoding_holds_one_copy(kernels, tmp_path: Path, project_root: Path):
    arch = ArchConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
        }
    )
    params = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.5, jnp.float32), abstract_params(arch)
    )
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_params(tmp_path / "big", arch, params, dtype=jnp.float32)
    del params
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big"), kernels],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    assert measured["size"] < (0.35 if kernels == "int8" else 1.01) * whole
    # Beside the result: some tensors on their way, and the programs that round them; the floats
    # are never there as a whole.
    assert measured["grown"] < (0.9 if kernels == "int8" else 1.3) * whole
