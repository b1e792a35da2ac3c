"""The model shapes of the benchmarks, and checkpoints of these shapes with random weights.

In: a shape's name. Out: an architecture, or a Hugging Face folder.
"""

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from benchmarks.setting import PROJECT_ROOT
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params
from ivl_jax.weights.hf_folder import SINGLE_FILE
from ivl_jax.weights.hf_names import file_shapes
from ivl_jax.weights.safetensors_file import write_file

SHARED = PROJECT_ROOT.parent / "shared"
_LLAMA_2 = SHARED / "tokenizers/llama2"
_NARROWEST = 64  # no kernel here is narrower, and no network has as many layers
_SCALE = 0.02  # standard deviation of random weights; logits then stay small


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ArchConfig:
    return ArchConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32_000,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        }
    )


# Pair A: a base of 134 M parameters with a value network of 24 M. Pair B: TinyLlama-1.1B's shape
# with pair A's value network.
BASE_A = _llama(hidden=768, layers=12, heads=12, kv_heads=12, intermediate=2048)
VALUE_A = _llama(hidden=288, layers=6, heads=6, kv_heads=6, intermediate=768)
BASE_B = _llama(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632)
# A draft for pair A, a tenth of its base.
DRAFT_A = _llama(hidden=192, layers=2, heads=3, kv_heads=3, intermediate=512)
# Llama-2-7B's shape, for accelerators; with BASE_B as its value network.
BASE_7B = _llama(hidden=4096, layers=32, heads=32, kv_heads=32, intermediate=11_008)
# Pair C, a fifth of pair A, for decoding tens of thousands of tokens: 24 M and 9 M.
BASE_C = VALUE_A
VALUE_C = _llama(hidden=128, layers=2, heads=4, kv_heads=4, intermediate=352)


def draw_params(shapes: Params, seed: int) -> Params:
    """Draw random weights array by array, with one program per shape instead of one for all.

    On a GPU the initialisation of 32 unrolled layers in a single program compiled for 217 s.

    Args:
        shapes: from `abstract_params`.
        seed: combined with each array's index.

    Returns:
        Matrices near zero, and norm scales of ones.
    """
    key = jax.random.key(seed)
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [
        _draw(jax.random.fold_in(key, index), leaf.shape, jnp.dtype(leaf.dtype).name)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key: Key[Array, ""], shape: tuple[int, ...], dtype: str) -> Array:
    # The scales of stacked layers have two axes too, of which one is short.
    if len(shape) == 1 or min(shape[-2:]) < _NARROWEST:
        return jnp.ones(shape, dtype)
    return jnp.asarray(_SCALE, dtype) * jax.random.normal(key, shape, dtype)


def parameter_count(arch: ArchConfig) -> int:
    """Number of parameters of a shape."""
    return sum(math.prod(shape) for shape in file_shapes(arch).values())


def write_checkpoint(folder: Path, arch: ArchConfig, *, tokenizer: bool = False) -> int:
    """Write a Hugging Face folder with random float32 weights, holding one tensor at a time.

    Args:
        folder: an existing folder.
        arch: the shape.
        tokenizer: whether to add the Llama-2 tokenizer.

    Returns:
        Bytes of the weights' file.

    Raises:
        FileNotFoundError: the tokenizer is requested, but ../shared does not exist.
        OSError: the file does not fit on the disk.
    """
    shapes = file_shapes(arch)
    needed = 4 * parameter_count(arch)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise OSError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")
    write_file(folder / SINGLE_FILE, shapes, _random(shapes), dtype=np.dtype(np.float32))
    config = json.dumps(arch.to_hf() | {"dtype": "float32"})
    (folder / "config.json").write_text(config, encoding="utf-8")
    if tokenizer:
        for file in _LLAMA_2.glob("tokenizer*.json"):
            shutil.copy(file, folder)
        if not (folder / "tokenizer.json").exists():
            raise FileNotFoundError(f"this benchmark needs the Llama-2 tokenizer in {_LLAMA_2}")
    return (folder / SINGLE_FILE).stat().st_size


def _random(shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Arrays of these shapes, cut from one block, since random numbers take seconds to draw."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    block = _SCALE * np.random.default_rng(0).standard_normal(max(sizes), np.float32)
    for size, shape in zip(sizes, shapes.values(), strict=True):
        yield np.roll(block[:size], size % 997).reshape(shape)
