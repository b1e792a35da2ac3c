"""Which form of attention is chosen, from devices that need not be attached."""

import logging
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from ivl_jax.model.attention import form as form_module
from ivl_jax.model.attention.form import SHORT_ROW, choose_form
from tests.model.families import tiny_arch, without

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H100 = SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")
T4 = SimpleNamespace(platform="gpu", device_kind="T4", compute_capability="7.5")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
LONG = 2 * SHORT_ROW


def choose(device, *, wanted: Any = "auto", name="llama3", dtype=jnp.bfloat16, **changes):
    arch = without(tiny_arch(name), changes)
    return choose_form(wanted, arch, dtype=dtype, devices=[device])


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        (TPU, {}, "splash"),
        (TPU, {"name": "gemma2", "dtype": jnp.float32, "head_dim": 256}, "splash"),
        (H100, {}, "cudnn"),
        (H100, {"dtype": jnp.float32}, "blocked"),
        (H100, {"name": "gemma2"}, "blocked"),  # a soft cap
        (H100, {"head_dim": 256}, "blocked"),
        (H100, {"head_dim": 20}, "blocked"),
        (T4, {}, "blocked"),
        (CPU, {}, "blocked"),
    ],
)
def test_a_device_takes_the_fastest_form_that_it_has(device, options, expected):
    assert choose(device, **options).at_length(LONG) == expected


@pytest.mark.parametrize("device", [TPU, H100, CPU])
def test_short_rows_take_the_plain_form(device):
    assert choose(device).at_length(100) == "plain"


def test_cudnn_has_no_gradient_of_odd_lengths_so_they_go_in_blocks():
    assert choose(H100).at_length(LONG + 1) == "blocked"


@pytest.mark.parametrize("device", [TPU, H100, CPU])
@pytest.mark.parametrize("wanted", ["plain", "blocked"])
def test_a_form_that_runs_everywhere_can_be_forced_at_every_length(device, wanted):
    form = choose(device, wanted=wanted)
    assert form.at_length(4) == form.at_length(LONG) == wanted


@pytest.mark.parametrize(
    ("device", "wanted", "options", "reason"),
    [
        (CPU, "splash", {}, "is for TPUs, and these are cpu"),
        (CPU, "cudnn", {}, "is for NVIDIA GPUs, and these are cpu"),
        (T4, "cudnn", {}, "compute capability 8.0, found 7.5"),
        (H100, "cudnn", {"dtype": jnp.float32}, "16-bit floats, found float32"),
        (H100, "cudnn", {"head_dim": 256}, "heads of at most 128 numbers.*found 256"),
        (H100, "cudnn", {"name": "gemma2"}, "no soft cap"),
    ],
)
def test_a_form_that_cannot_be_is_refused_with_the_reason(device, wanted, options, reason):
    with pytest.raises(ValueError, match=f"attention = '{wanted}': .*{reason}.*'blocked'"):
        choose(device, wanted=wanted, **options)


def test_the_choice_is_logged_once_with_its_reason(caplog):
    form_module._say.cache_clear()
    with caplog.at_level(logging.INFO):
        choose(T4)
        choose(T4)
    assert len(caplog.records) == 1
    assert "the blocked form on T4 (cuDNN's kernel needs compute capability 8.0" in caplog.text
