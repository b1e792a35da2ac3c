"""Checkpoints for benchmarks are real ones of the shapes they are named by."""

import shutil
from collections import namedtuple
from pathlib import Path

import jax
import pytest

from benchmarks import load as load_benchmark
from benchmarks.load import load, load_with_torch
from benchmarks.report import Options
from benchmarks.shapes import BASE_A, BASE_B, VALUE_A, parameter_count, write_checkpoint
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.weights.language_model import load_language_model

TINY = ArchConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
)


def test_shapes_have_the_parameters_they_are_named_by() -> None:
    assert round(parameter_count(BASE_A) / 1e6) == 134
    assert round(parameter_count(VALUE_A) / 1e6) == 24
    assert round(parameter_count(BASE_B) / 1e9, 1) == 1.1


def test_a_checkpoint_loads_as_a_language_model(tmp_path: Path, llama2_tokenizer_dir: Path) -> None:
    size = write_checkpoint(tmp_path, TINY, tokenizer=True)
    model = load_language_model(tmp_path)
    assert model.arch == TINY
    leaves = jax.tree.leaves(model.params)
    assert sum(leaf.size for leaf in leaves) == parameter_count(TINY)
    assert 4 * parameter_count(TINY) < size < 4 * parameter_count(TINY) + 10_000
    kernel = model.params["layers"][0]["mlp"]["up_proj"]["kernel"]
    assert 0.01 < float(kernel.std()) < 0.03


def test_both_sides_of_the_load_benchmark_load_it(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    write_checkpoint(tmp_path, TINY)
    for loading in (load(str(tmp_path)), load_with_torch(str(tmp_path), 2)):
        assert loading.seconds > 0
        assert loading.peak > 4 * parameter_count(TINY)


def test_a_full_disk_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"GB are needed, 0\.0 are free"):
        write_checkpoint(tmp_path, TINY)
    assert not any(tmp_path.iterdir())


def test_too_little_memory_is_reported_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_benchmark, "available_memory", lambda: 10**9)
    monkeypatch.setattr(load_benchmark, "write_checkpoint", lambda *_: pytest.fail("written"))
    with pytest.raises(MemoryError, match=r"10\.6 GB are needed, 1\.0 are available"):
        load_benchmark.run(Options())
