"""GRPO as an objective: advantages, what the mean is over, weights of the clipped loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivl_jax.config import GrpoConfig
from ivl_jax.training.objectives.grpo import advantages, make_grpo
from tests.training.tiny import make_batch, on_device


def test_advantages_compare_the_answers_of_a_prompt() -> None:
    rewards = np.array([[1.0, 3.0, 2.0, 2.0], [0.1, 0.1, 0.1, 0.1]])
    centred = advantages(rewards, standardised=False)
    np.testing.assert_allclose(centred, [[-1, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        advantages(rewards, standardised=True), centred / (np.sqrt(0.5) + 1e-4), rtol=1e-6
    )
    # Rewards that differ by rounding alone are no reason to change anything.
    assert np.abs(advantages(np.array([[0.3, 0.1 + 0.2]]), standardised=True)).max() < 1e-9


@pytest.mark.parametrize("average", ["answers", "tokens", "constant"])
def test_loss_is_a_mean_over_answers_or_over_tokens(average) -> None:
    batch = on_device(make_batch())
    rng = np.random.default_rng(0)
    shape = batch.tokens.shape
    advantage, log_prob, kl = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    batch = batch._replace(advantages=advantage)
    objective = make_grpo(GrpoConfig(average=average, kl_weight=0.3, max_new_tokens=50))
    weights = objective.weigh(batch, {})
    summed = jnp.sum(weights["log_prob"] * log_prob) + jnp.sum(weights["base_kl"] * kl)
    per_token = np.asarray(-advantage * log_prob + 0.3 * kl, np.float64)
    counted, ids = np.asarray(batch.loss_mask), np.asarray(batch.segment_ids)
    answers = [
        per_token[row][counted[row] & (ids[row] == number)]
        for row in range(shape[0])
        for number in (1, 2)
    ]
    means = [one.mean() for one in answers if one.size]
    expected = {
        "answers": np.mean(means),
        "tokens": per_token[counted].mean(),
        # Answers without a counted token, which were truncated, are in the divisor.
        "constant": per_token[counted].sum() / (50 * sum(len(set(row) - {0}) for row in ids)),
    }[average]
    assert float(summed / objective.count(batch)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("average", ["answers", "tokens"])
def test_weights_are_the_gradient_of_the_clipped_loss(average) -> None:
    batch = on_device(make_batch())
    rng = np.random.default_rng(1)
    shape = batch.tokens.shape
    advantage, log_prob, kl, moved = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in "alkm"
    )
    batch = batch._replace(advantages=advantage, sampled_log_probs=log_prob - 0.3 * moved)
    options = GrpoConfig(updates=2, average=average, clip_low=0.1, clip_high=0.3, kl_weight=0.5)
    objective = make_grpo(options)
    assert objective.loss is not None
    scores = {"log_prob": log_prob, "base_kl": kl, "entropy": kl}
    found = objective.weigh(batch, {"log_prob": log_prob})
    wanted = jax.grad(lambda scores: objective.loss(batch, scores))(scores)
    counted = np.asarray(batch.loss_mask)
    for name in ("log_prob", "base_kl"):
        weights = np.where(counted, found[name], 0)
        np.testing.assert_allclose(weights, wanted[name], rtol=1e-5, atol=1e-7)
    ratio = np.exp(0.3 * np.asarray(moved))
    up, sign = ratio > 1.3, np.asarray(advantage) > 0
    clipped = counted & np.where(sign, up, ratio < 0.9)
    assert 0 < clipped.sum() < counted.sum()
    assert float(objective.sums(batch, scores)["clipped"]) == clipped.sum()
    # A ratio beyond the border does not matter where the advantage pulls back.
    assert np.all(np.asarray(found["log_prob"])[counted & up & ~sign] != 0)
