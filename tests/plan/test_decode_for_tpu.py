"""The debug family's decoding programs, compiled for four v5e chips by their own compiler."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ivl_jax.decoding.shapes import abstract_composition, lower_chunk, lower_prefill
from ivl_jax.plan.devices import describe_devices
from ivl_jax.plan.machines import find_machine
from ivl_jax.sharding import make_mesh
from ivl_jax.target_platform import tracing_for
from ivl_jax.weights.language_model import read_arch
from tests.training.tiny import make_arch

pytest.importorskip("libtpu", reason="the extra `plan-tpu` is not installed")

ROWS, CAPACITY, PROMPT = 64, 32_768, 1024  # 268 MB of caches per chip: more than its fast memory


@pytest.fixture(scope="module")
def composed():
    devices = describe_devices(find_machine("v5e-4"))
    arch = read_arch(Path("ivl_jax/assets/family/S"))
    mesh = make_mesh(tensor=4, devices=devices)
    # The tests' own precision is not one that the kernel has for bfloat16.
    with tracing_for("tpu"), jax.default_matmul_precision("default"):
        yield arch, *abstract_composition(arch, [arch], mesh=mesh, dtype=jnp.bfloat16)


def cache_bytes(arch):
    """Of two networks on one of four chips, each with its own heads."""
    numbers = 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim
    return 2 * 2 * ROWS * CAPACITY * numbers // 4


@pytest.mark.slow
def test_a_decode_chunk_copies_no_cache(composed):
    arch, composition, params = composed
    compiled = lower_chunk(composition, params, rows=ROWS, capacity=CAPACITY).compile()
    memory = compiled.memory_analysis()
    caches = cache_bytes(arch)
    assert memory.alias_size_in_bytes == pytest.approx(caches, rel=0.05)
    assert memory.temp_size_in_bytes < 0.4 * caches
    shape = f"{ROWS},1,{CAPACITY},{arch.head_dim}"
    assert not re.findall(rf"= bf16\[{shape}\]\S* copy\(", compiled.as_text())


@pytest.mark.slow
def test_prefill_attends_over_the_prompt_in_the_kernel_for_tpus(composed):
    arch, composition, params = composed
    lowered = lower_prefill(composition, params, rows=ROWS, prompt=PROMPT, capacity=CAPACITY)
    compiled = lowered.compile()
    assert "splash" in compiled.as_text()
    caches = cache_bytes(arch)
    outputs = compiled.memory_analysis().output_size_in_bytes
    assert outputs == pytest.approx(caches, rel=0.05)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * caches


def test_generating_copies_no_kernel():
    width, devices = 4096, describe_devices(find_machine("v5e-8"))
    arch = make_arch(
        hidden_size=width,
        intermediate_size=256,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=2048,
    )
    mesh = make_mesh(tensor=8, devices=devices)
    with tracing_for("tpu"), jax.default_matmul_precision("default"):
        composition, params = abstract_composition(arch, mesh=mesh, dtype=jnp.bfloat16)
        compiled = lower_chunk(composition, params, rows=8, capacity=2048).compile()
    assert not re.findall(rf"= bf16\[{width},{width // 8}\]\S* copy\(", compiled.as_text())


def test_shapes_are_those_of_the_arrays_that_decode(composed):
    arch, _, params = composed
    kernel = params.base["lm_head"]["kernel"]
    assert kernel.shape == (arch.hidden_size, 2048)
    assert kernel.sharding.shard_shape(kernel.shape) == (arch.hidden_size, 512)
    assert jax.tree.structure(params.base) == jax.tree.structure(params.values[0].params)
