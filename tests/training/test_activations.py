"""The estimate of what layers keep, and the policy that is chosen from it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from ivl_jax.config import ConfigError, config_from_mapping
from ivl_jax.model.attention.form import PLAIN
from ivl_jax.training.activations import choose_remat, kept_bytes
from tests.training.tiny import make_arch

ARCH = make_arch(hidden_size=32, intermediate_size=64, num_hidden_layers=3)
SIZES: Any = {"length": 16, "compute_dtype": jnp.float32, "attention": PLAIN}


def kept(remat, arch=ARCH, **changes):
    return kept_bytes(arch, remat, **(SIZES | changes))


def test_full_keeps_the_residual_stream_before_each_layer_and_dots_the_projections_too():
    stream = 16 * 32 * 4
    ends = 3 * stream  # the final norm's input and intermediate results
    assert 3 * stream <= kept("full") <= 3 * stream + 2 * ends
    projected = 16 * 4 * (3 * 32 + 32 + 2 * 64)  # queries, keys, values; attention's; gate and up
    assert kept("dots") - kept("full") == pytest.approx(3 * projected, rel=0.1)
    assert kept("none") > 1.5 * kept("dots")


def test_what_is_kept_grows_with_depth_and_length_and_halves_in_bfloat16():
    deep = dataclasses.replace(ARCH, num_hidden_layers=6, layer_types=ARCH.layer_types * 2)
    assert kept("dots", deep) == pytest.approx(2 * kept("dots"), rel=0.2)
    assert kept("dots", length=32) == pytest.approx(2 * kept("dots"), rel=0.02)
    assert kept("dots", compute_dtype=jnp.bfloat16) < 0.6 * kept("dots")


def test_the_policy_is_the_one_that_computes_least_twice_and_fits(caplog):
    rows, held = 4, 1000
    caplog.set_level("INFO")
    chosen = {}
    for name in ("none", "dots", "full"):
        memory = int((rows * kept(name) + held) / 0.8) + 2
        chosen[name] = choose_remat(ARCH, rows=rows, held=held, memory=memory, **SIZES)
    assert chosen == {"none": "none", "dots": "dots", "full": "full"}
    assert 'step.remat: "dots" for 4 rows of 16 tokens per device' in caplog.text
    assert choose_remat(ARCH, rows=rows, held=held, memory=None, **SIZES) == "full"


@pytest.mark.parametrize(
    ("written", "read"), [(True, "full"), (False, "none"), ("dots", "dots"), ("auto", "auto")]
)
def test_files_of_earlier_versions_say_remat_by_a_boolean(written, read):
    assert config_from_mapping({"step": {"remat": written}}).step.remat == read


def test_another_value_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"step\.remat must be one of auto, none, full, dots; got 'some'"
    ):
        config_from_mapping({"step": {"remat": "some"}})
