"""Logits equal transformers' (PyTorch, eager attention, fp32) in every family, not by chance."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import Params, build_decoder, forward
from tests.model.families import (
    LENGTH,
    NAMES,
    QUICK,
    WITHOUT,
    params_for,
    random_params,
    row_positions,
    state_dict,
    tiny_arch,
    tokens,
    without,
)

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

TOLERANCE = 5e-4  # float32 on both sides; up to 2.6e-4 seen, depending on the CPU
MOVES = 1e-2
ROWS = 3


def padding(side: str) -> np.ndarray:
    """1 on real tokens; rows of 160, 131 and 137 of them."""
    mask = np.ones((ROWS, LENGTH), np.int32)
    if side == "left":
        mask[1, :29], mask[2, :23] = 0, 0
    if side == "right":
        mask[1, -29:], mask[2, -23:] = 0, 0
    return mask


@functools.cache
def reference(name: str) -> transformers.PreTrainedModel:
    """The same parameters in transformers' own model of the family, through our config.json."""
    arch = tiny_arch(name)
    config = transformers.AutoConfig.for_model(**arch.to_hf())
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = {
        key: torch.from_numpy(value) for key, value in state_dict(arch, _params(name)).items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if arch.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()


@functools.cache
def _params(name: str) -> Params:
    return random_params(tiny_arch(name))


def ours(arch: ArchConfig, params: Params, mask: np.ndarray) -> np.ndarray:
    # Not jitted: families share the shapes of most operations, and so their compilation.
    logits = forward(
        build_decoder(arch),
        params,
        jnp.asarray(tokens(ROWS)),
        positions=jnp.asarray(row_positions(mask)),
        segment_ids=None if mask.all() else jnp.asarray(mask),
    )
    return np.asarray(logits)


@functools.cache
def theirs(name: str, side: str) -> np.ndarray:
    mask = padding(side)
    with torch.no_grad():
        return reference(name)(
            input_ids=torch.from_numpy(tokens(ROWS)),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(row_positions(mask)),
        ).logits.numpy()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, side)
        if side == "no" or name in QUICK
        else pytest.param(name, side, marks=pytest.mark.slow)
        for name in NAMES
        for side in ("no", "left", "right")
    ],
)
def test_logits_equal_transformers(name, side):
    mask = padding(side)
    real = mask.astype(bool)
    got = ours(tiny_arch(name), _params(name), mask)[real]
    expected = theirs(name, side)[real]
    assert expected.std() > 0.3
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "feature"),
    [(name, feature) for name, features in WITHOUT.items() for feature in features],
)
def test_a_feature_switched_off_moves_the_logits(name, feature):
    arch = without(tiny_arch(name), WITHOUT[name][feature])
    got = ours(arch, params_for(arch, _params(name)), padding("no"))
    assert np.abs(got - theirs(name, "no")).max() > MOVES
