"""Flags of the command line become configs."""

import pytest

from ivl_jax.command_line.flags import parse_flags
from ivl_jax.config import (
    GenerationOptions,
    InferConfig,
    MeshConfig,
    TrainConfig,
    config_from_mapping,
    config_to_mapping,
)
from ivl_jax.config.files import field_types


@pytest.mark.parametrize(
    ("flags", "remat"),
    [
        (["--step.remat"], "full"),
        (["--step.remat", "--seed", "1"], "full"),
        (["--step.no-remat"], "none"),
        (["--step.remat", "dots"], "dots"),
        ([], "auto"),
    ],
)
def test_a_flag_that_had_no_value_may_still_have_none(flags: list[str], remat: str) -> None:
    assert parse_flags(TrainConfig, flags, prog="train.py").step.remat == remat


def test_composed_configs_keep_their_flags_and_keys() -> None:
    arguments = ["--base", "b", "--value", "x", "--value", "y", "--strength", "1", "--strength"]
    arguments += ["-0.5", "--temperature", "0.7", "--stop", "\n", "--stop", "END"]
    arguments += ["--mesh.tensor", "2", "--compilation-cache", "c", "--prompt", ""]
    config = parse_flags(InferConfig, arguments, prog="infer.py")
    assert config.model.value == ("x", "y")
    assert config.model.strength == (1.0, -0.5)
    assert config.model.mesh == MeshConfig(fsdp=1, tensor=2)
    assert config.generation == GenerationOptions(temperature=0.7, stop=("\n", "END"))
    assert config.runtime.compilation_cache == "c"
    assert config_from_mapping(config_to_mapping(config), InferConfig) == config
    flags = ["--data.format", "alpaca", "--data.train", "a", "b", "--compilation-cache", "c"]
    train = parse_flags(TrainConfig, flags, prog="train.py")
    assert (train.data.rows.format, train.data.train) == ("alpaca", ("a", "b"))
    mapping = config_to_mapping(train)
    assert mapping["compilation_cache"] == "c"
    assert mapping["data"]["format"] == "alpaca"


def test_help_shows_every_flag_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(InferConfig, ["--help"], prog="infer.py")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for key in field_types(InferConfig):
        if key not in ("stop_ids", "strengths", "log_probs", "logit_bias", "mesh"):
            assert f" --{key.replace('_', '-')}" in shown
    assert "--stop-ids" not in shown
    assert "Hugging Face folder or hub id of the base model." in shown
    assert "Devices along each mesh axis" in shown
