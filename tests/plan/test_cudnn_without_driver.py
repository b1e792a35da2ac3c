"""cuDNN's attention, and the other forms, are lowered for a GPU that is not attached."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as asked

from ivl_jax.model.attention.entry import attend_to_own
from ivl_jax.model.attention.form import AttentionForm
from ivl_jax.plan import cudnn_without_driver
from ivl_jax.plan.cudnn_without_driver import ChangedJaxError, cudnn_for

OWN = {name: getattr(asked, name) for name in cudnn_without_driver._ASKED}


def answers():
    return {name: getattr(asked, name) for name in OWN}


def lowered(form, *, width, dtype=jnp.bfloat16, segments=True, window=None, softcap=None, kv=2):
    """StableHLO for CUDA of attention's value and gradients, 4 query heads to `kv` key heads."""
    shape = (2, 256, 4, width)
    keys = jax.ShapeDtypeStruct((2, kv, 256, width), dtype)
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if segments else None

    def loss(query, keys, values, ids):
        mixed = attend_to_own(
            query,
            keys,
            values,
            form=AttentionForm(form, block=64),
            segment_ids=ids,
            window=window,
            scale=width**-0.5,
            softcap=softcap,
        )
        return jnp.sum(mixed.astype(jnp.float32))

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    traced = program.trace(jax.ShapeDtypeStruct(shape, dtype), keys, keys, ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"width": 64, "segments": False},
        {"width": 64, "segments": False, "window": 40},
        {"width": 128, "kv": 4},
        {"width": 64, "window": 40},
        {"width": 128, "kv": 1, "window": 300},
    ],
)
def test_cudnn_attention_is_two_causal_kernels_without_scores(options, dtype):
    with cudnn_for((8, 0)):
        text = lowered("cudnn", dtype=dtype, **options)
    biased = options.get("segments", True)
    kernel = "__cudnn$fmhaScaleBiasSoftmax" if biased else "__cudnn$fmhaSoftmax"
    assert all(f"@{name}(" in text for name in (kernel, f"{kernel}Backward"))
    assert text.count("\\22mask_type\\22: \\22CAUSAL\\22") == 2
    window = 0 if biased else options.get("window", 0)
    assert text.count(f"\\22sliding_window_length\\22: {window}") == 2
    assert "dot_general" not in text
    assert ("2x1x256x256" in text) == biased


@pytest.mark.parametrize(
    "options",
    [
        {"width": 64},
        {"width": 256, "window": 40},
        {"width": 128, "softcap": 30.0, "dtype": jnp.float16},
        {"width": 64, "dtype": jnp.float32, "segments": False},
    ],
)
def test_blocked_attention_is_lowered_for_gpus_without_all_scores(options):
    text = lowered("blocked", **options)
    assert "custom_call" not in text
    assert "2x2x2x64x256" in text  # scores of 64 queries: rows, key heads, queries a key, queries
    assert "2x2x2x256x256" not in text


def test_plain_attention_is_lowered_for_gpus_with_all_scores():
    assert "2x2x2x256x256" in lowered("plain", width=64)


def test_jax_answers_for_itself_again_afterwards():
    with cudnn_for((9, 0)):
        assert asked.check_cudnn_version() == 91000
        assert asked.check_compute_capability("8.9")
        assert not asked.check_compute_capability("10.0")
        assert asked.is_cuda_compute_capability_equal("9.0")
        assert not asked.is_cuda_compute_capability_equal("9.1")
        with cudnn_for((8, 0)):
            assert not asked.check_compute_capability("8.9")
        assert asked.check_compute_capability("8.9")
    assert answers() == OWN


def test_jax_answers_for_itself_again_after_an_error():
    with pytest.raises(KeyError), cudnn_for((9, 0)):
        raise KeyError
    assert answers() == OWN


def test_a_jax_that_asks_otherwise_is_named(monkeypatch):
    monkeypatch.delattr(asked, "check_cudnn_version")
    with pytest.raises(ChangedJaxError, match=r"no check_cudnn_version.*--model.attention blocked"):
        cudnn_for((9, 0)).__enter__()
