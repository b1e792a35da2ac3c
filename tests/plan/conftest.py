"""A run that tests plan: both of its models are a folder with nothing but a config.json."""

import json

import pytest

from ivl_jax.config import (
    BaseConfig,
    DataConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
    ValueConfig,
)
from tests.model.families import CONFIGS


@pytest.fixture
def config(tmp_path):
    """A folder with nothing but a config.json is base and value."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama3"]))
    path = str(tmp_path)
    return TrainConfig(
        run_dir="runs/none",
        base=BaseConfig(path=path, param_dtype="bfloat16"),
        value=ValueConfig(init="pretrained", path=path),
        data=DataConfig(train=("none.json",), max_length=16),
        optimizer=OptimizerConfig(),
        step=StepConfig(batch_size=16, micro_batches=2),
    )
