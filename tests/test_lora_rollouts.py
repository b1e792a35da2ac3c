"""An adapter learns from answers that are sampled with it, merged, in every step."""

from dataclasses import replace

import numpy as np
import pytest

from ivl_jax.config import GrpoConfig, LoraConfig, OptimizerConfig, PenaltyConfig, StepConfig
from ivl_jax.post_training import run
from tests.training.conftest import make_tiny_config, tiny_pair  # noqa: F401
from tests.training.runs import records

pytestmark = pytest.mark.usefixtures("caplog")


@pytest.mark.slow
def test_rewards_rise_where_only_an_adapter_is_trained(tiny_pair, tmp_path) -> None:  # noqa: F811
    config = make_tiny_config(tiny_pair, tmp_path / "run")
    lora = LoraConfig(rank=4, param_dtype="bfloat16")
    result = run(
        replace(
            config,
            objective="grpo",
            value=replace(config.value, lora=lora),
            grpo=GrpoConfig(
                rewards=("tests.test_post_training:ascii_share",),
                group_size=4,
                max_new_tokens=6,
                kl_weight=0.01,
                mask_truncated=False,
            ),
            penalty=PenaltyConfig(kind="none"),
            optimizer=OptimizerConfig(learning_rate=3e-2),
            step=StepConfig(max_steps=6, batch_size=16),
        )
    )
    rewards = [one["reward"] for one in records(result.run_dir) if "loss" in one]
    assert np.mean(rewards[-2:]) > rewards[0] + 0.05
