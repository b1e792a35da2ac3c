"""Whole runs with every connection scheme: they learn, and the value folder says which they are."""

from dataclasses import replace

import numpy as np
import pytest

from ivl_jax.checkpoint import load_value
from ivl_jax.checkpoint.__main__ import main as checkpoint_command
from ivl_jax.config import ConfigError, MeshConfig, StepConfig, ValueConfig
from ivl_jax.decoding.compose import compose
from ivl_jax.sharding import single_device_mesh
from ivl_jax.training import limits
from ivl_jax.training.loop import run
from ivl_jax.training.models import choose_models
from ivl_jax.weights.language_model import load_language_model
from tests.training.conftest import save_tiny_model
from tests.training.runs import records

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")
STEPS = StepConfig(max_steps=6, batch_size=4)


@pytest.mark.parametrize(
    "connection", ["cascade", pytest.param("cascade_no_text", marks=pytest.mark.slow), "hidden"]
)
def test_a_value_network_that_reads_its_base_learns_and_its_folder_says_so(tiny_config, connection):
    value = replace(tiny_config.value, connection=connection)
    result = run(replace(tiny_config, value=value, step=STEPS))
    start = records(result.run_dir)[0]["held_out"]
    assert result.held_out["nll"] < start["nll"] - 0.1
    assert load_value(result.output).connection == connection


@pytest.mark.slow
def test_hidden_starts_as_a_network_that_reads_text_and_fits_only_bases_of_its_width(
    tiny_config, tiny_pair, tmp_path
):
    result = run(
        replace(tiny_config, value=replace(tiny_config.value, connection="hidden"), step=STEPS)
    )
    text_only = run(replace(tiny_config, run_dir=str(tmp_path / "text"), step=STEPS))
    first, same = (records(each.run_dir)[0]["held_out"]["nll"] for each in (result, text_only))
    assert first == pytest.approx(same, rel=1e-6)
    value = load_value(result.output)
    assert np.abs(np.asarray(value.params["base_projection"]["kernel"])).max() > 0
    base = load_language_model(tiny_pair / "base")
    compose(base, value)
    wide = save_tiny_model(tmp_path / "wide", seed=3, hidden_size=32, intermediate_size=64)
    with pytest.raises(ValueError, match=r"expects width 16, but .*wide has width 32"):
        compose(load_language_model(wide), value)


@pytest.mark.parametrize(
    ("rank", "mesh"),
    [
        pytest.param(0, MeshConfig(fsdp=1), marks=pytest.mark.slow),
        (8, MeshConfig(fsdp=2, tensor=2)),
    ],
)
def test_a_linear_map_starts_as_the_base_learns_and_is_a_value_folder(
    tiny_config, rank, mesh, capsys
):
    value = ValueConfig(connection="linear", init="scratch", rank=rank)
    result = run(replace(tiny_config, value=value, step=STEPS, mesh=mesh))
    start = records(result.run_dir)[0]["held_out"]
    assert start["nll"] == start["base_nll"]
    assert start["mean_abs_value"] == 0.0
    assert result.held_out["nll"] < start["nll"] - 0.01
    linear = load_value(result.output)
    assert linear.connection == "linear"
    assert (linear.arch.vocab_size, linear.arch.rank) == (258, rank)
    shapes = {name: part["kernel"].shape for name, part in linear.params.items()}
    low = {"down_proj": (258, 8), "lm_head": (8, 258)}
    assert shapes == (low if rank else {"lm_head": (258, 258)})
    assert np.abs(np.asarray(linear.params["lm_head"]["kernel"])).max() > 0
    out = str(result.run_dir / "exported")
    exported = ["export-value", str(result.run_dir), out, "--step", "6"]
    assert checkpoint_command(exported) == 0
    np.testing.assert_array_equal(
        np.asarray(load_value(out).params["lm_head"]["kernel"]),
        np.asarray(linear.params["lm_head"]["kernel"]),
    )
    assert checkpoint_command(["export-hf", out, out + "-hf"]) == 1
    assert "connection linear, expected residual" in capsys.readouterr().err


def test_a_full_map_that_does_not_fit_names_the_sizes_and_the_remedy(tiny_config, monkeypatch):
    monkeypatch.setattr(limits, "device_memory", lambda mesh: 500_000)
    value = ValueConfig(connection="linear", init="scratch")
    with pytest.raises(ConfigError, match=r"V² = 258² parameters .* set value.rank; 129 takes"):
        choose_models(replace(tiny_config, value=value), single_device_mesh())
    choose_models(replace(tiny_config, value=replace(value, rank=16)), single_device_mesh())
