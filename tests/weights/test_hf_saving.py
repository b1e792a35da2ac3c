"""Folders that we write: the same bytes again, shards, and what transformers reads from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import (
    abstract_params,
    build_decoder,
    forward,
    init_params,
    stack_layers,
)
from ivl_jax.sharding import make_mesh, parameter_shardings
from ivl_jax.tree_compare import TreeMismatchError
from ivl_jax.weights.hf_checkpoint import load_params
from ivl_jax.weights.hf_saving import save_params
from tests.weights.equality import assert_equal_bits

SINGLE = "model.safetensors"
Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]


def test_saving_what_was_loaded_gives_the_same_bytes(
    arch: ArchConfig, tensors: Tensors, write_folder: Write, tmp_path: Path
) -> None:
    mesh = make_mesh(fsdp=2, tensor=4)
    shardings = parameter_shardings(abstract_params(arch, vocab_rows=64), mesh)
    folder = write_folder({SINGLE: tensors})
    params = load_params(folder, arch, vocab_rows=64, shardings=shardings)
    save_params(tmp_path / "back", arch, params, dtype=jnp.float32)
    saved = load_file(tmp_path / "back" / SINGLE)
    assert set(saved) == set(tensors)
    for name, array in tensors.items():
        assert saved[name].tobytes() == array.tobytes(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert ArchConfig.from_hf(config) == arch


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_models_are_split_into_shards_that_load_again(
    arch: ArchConfig, tmp_path: Path, dtype: Any
) -> None:
    params = init_params(arch, jax.random.key(0), param_dtype=dtype)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    # What fits exactly is one file; a byte less makes two.
    for limit, count in ((total, 1), (total - 1, 2), (largest, None)):
        folder = tmp_path / str(limit)
        save_params(folder, arch, params, dtype=dtype, shard_bytes=limit)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(files) == count if count else len(files) > 2
        if count != 1:
            assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == total
        assert all((folder / file).stat().st_size < limit + 6_000 for file in files)
        assert_equal_bits(load_params(folder, arch, param_dtype=dtype), params)


def test_what_is_not_the_architectures_tree_is_not_saved(
    arch: ArchConfig, tied_arch: ArchConfig, tmp_path: Path
) -> None:
    params = init_params(arch, jax.random.key(0))
    with pytest.raises(TreeMismatchError, match=r"lm_head\.kernel: expected nothing.*\n.*untied"):
        save_params(tmp_path / "x", tied_arch, params, dtype=jnp.float32)
    with pytest.raises(TreeMismatchError, match="unstack_layers"):
        save_params(tmp_path / "x", arch, stack_layers(params), dtype=jnp.float32)
    cropped = init_params(arch, jax.random.key(0), vocab_rows=39)
    with pytest.raises(TreeMismatchError, match=r"embedding: expected \[40, 16\], got \[39, 16\]"):
        save_params(tmp_path / "x", arch, cropped, dtype=jnp.float32)
    assert list(tmp_path.iterdir()) == []


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.75},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
}


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, marks=pytest.mark.slow)
        if tied and family not in ("llama", "gemma2")
        else (family, tied)
        for family in FAMILIES
        for tied in (False, True)
    ],
)
def test_transformers_computes_identical_logits_from_what_is_saved(
    family: str, tied: bool, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    config = AutoConfig.for_model(
        family,
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **FAMILIES[family],
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    arch = ArchConfig.from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    params = load_params(tmp_path / "theirs", arch, vocab_rows=64)
    save_params(tmp_path / "ours", arch, params, dtype=jnp.float32)
    ours, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        wanted, got = theirs(tokens).logits, ours.eval()(tokens).logits
    assert torch.equal(wanted, got)
    logits = forward(
        build_decoder(arch),
        params,
        jnp.asarray(tokens.numpy(), jnp.int32),
        positions=jnp.arange(32)[None],
    )
    np.testing.assert_allclose(logits[..., :48], wanted, atol=2e-4)
