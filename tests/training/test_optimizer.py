"""The schedule's shape, the decay mask, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivl_jax.training.optimizer import decay_mask, make_optimizer, make_schedule

PEAK = 1e-3


def schedule(shape="cosine", **overrides):
    fields = {"warmup_fraction": 0.1, "final_fraction": 0.0, "total_steps": 100} | overrides
    return make_schedule(learning_rate=PEAK, schedule=shape, **fields)


def test_learning_rate_rises_to_the_peak_and_the_first_step_moves():
    rates = [float(schedule()(step)) for step in range(100)]
    assert rates[0] == pytest.approx(PEAK / 10)
    assert rates[9] == pytest.approx(PEAK)
    assert rates[10] == pytest.approx(PEAK)
    assert max(rates) <= PEAK * (1 + 1e-6)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_learning_rate_ends_at_the_floor(shape):
    assert float(schedule(shape)(100)) == pytest.approx(0, abs=1e-9)
    assert float(schedule(shape, final_fraction=0.1)(100)) == pytest.approx(0.1 * PEAK)
    middle = 0.5 * PEAK
    assert float(schedule(shape, warmup_fraction=0.0)(50)) == pytest.approx(middle)


def test_constant_stays_at_the_peak_after_warm_up():
    assert [float(schedule("constant")(step)) for step in (9, 50, 99)] == pytest.approx([PEAK] * 3)


def test_one_percent_of_few_steps_is_one_warm_up_step():
    rate = schedule(warmup_fraction=0.01, total_steps=20)
    assert float(rate(0)) == pytest.approx(PEAK)
    assert float(rate(1)) == pytest.approx(PEAK)


def test_a_run_that_is_all_warm_up_works():
    rate = schedule(warmup_fraction=1.0, total_steps=4)
    assert [float(rate(step)) for step in range(4)] == pytest.approx(
        [PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK]
    )


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="total_steps = 0"):
        schedule(total_steps=0)


PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((4, 2))},
    "layers": {"self_attn": {"q_proj": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}}},
    "norm": {"scale": jnp.ones((3, 2))},
}


def test_weight_decay_acts_on_matrices_only_even_when_layers_are_stacked():
    assert decay_mask(PARAMS) == {
        "embed_tokens": {"embedding": True},
        "layers": {"self_attn": {"q_proj": {"kernel": True, "bias": False}}},
        "norm": {"scale": False},
    }


def update(gradients, **overrides):
    fields = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    fields |= {"max_gradient_norm": 0.0} | overrides
    optimizer = make_optimizer(optax.constant_schedule(1.0), **fields)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        changes, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, changes)


def test_zero_gradients_decay_matrices_and_leave_scales_and_biases():
    new = update(jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(new["embed_tokens"]["embedding"], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(new["norm"]["scale"], 1.0)
    np.testing.assert_array_equal(new["layers"]["self_attn"]["q_proj"]["bias"], 1.0)


def test_gradients_above_the_norm_are_scaled_down_to_it():
    # Adam is blind to scale except through epsilon: with a huge one the update is ∝ the gradient.
    big = jax.tree.map(lambda leaf: jnp.full_like(leaf, 100.0), PARAMS)
    fields = {"weight_decay": 0.0, "epsilon": 1e6}
    free = update(big, **fields)["norm"]["scale"] - 1
    clipped = update(big, max_gradient_norm=1.0, **fields)["norm"]["scale"] - 1
    norm = float(optax.tree.norm(big))
    np.testing.assert_allclose(clipped * norm, free, rtol=0.05)
