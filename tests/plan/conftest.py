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
from ivl_jax.plan.training import TrainingPlan
from tests.model.families import CONFIGS


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    """Compilations of this test are not answered by those of an earlier one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plan():
    """A plan that does not fit; tests replace what matters to them."""
    return TrainingPlan(
        base=1,
        value=2,
        optimizer=4,
        batch=0,
        temporaries=20,
        peak=27,
        available=16,
        fits=False,
        tokens=1,
        flops=6e12,
        traffic=4e9,
        sent={"all-gather": 10**9, "all-reduce": 2 * 10**9},
        ways=8,
        remat="none",
        limits={"compute": 0.5, "memory": 0.25, "interconnect": 0.75},
    )


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
