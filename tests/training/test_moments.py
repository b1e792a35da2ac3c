"""Moments in bfloat16: rounded without bias, so that the second one neither stalls nor drifts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivl_jax.training.moments import round_stochastically
from ivl_jax.training.optimizer import make_optimizer

GRADIENT = 0.01


def adamw(moment_dtype, **overrides):
    fields = {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    fields |= {"max_gradient_norm": 0.0} | overrides
    return make_optimizer(optax.constant_schedule(1.0), moment_dtype=moment_dtype, **fields)


def second_moment_after(steps, optimizer, gradient, state):
    """The second moment of a kernel that sees the same gradient at every step."""
    params = {"kernel": gradient}

    def one(state, _):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update({"kernel": gradient}, state, params)[1], None

    state = jax.jit(lambda state: jax.lax.scan(one, state, None, length=steps)[0])(state)
    return state[0].nu["kernel"], state


@pytest.mark.parametrize("value", [1.0, 1.003, 3.3e-9, 0.0, 65535.0])
def test_the_expectation_of_a_rounded_number_is_the_number(value):
    rounded = round_stochastically(jnp.full((20_000,), value, jnp.float32), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    wide = np.asarray(rounded, np.float64)
    assert len(np.unique(wide)) <= 2
    assert np.abs(wide - value).max() <= 2**-7 * abs(value)
    assert wide.mean() == pytest.approx(value, rel=2e-4)
    exact = float(jnp.float32(jnp.bfloat16(value)))
    if exact == value:
        np.testing.assert_array_equal(wide, value)


def test_the_second_moment_follows_gradients_that_shrink():
    """Rounded to nearest it would stay where it was: a step changes it by 0.1 % of itself."""
    large, small = (jnp.full((512,), size, jnp.float32) for size in (1.0, GRADIENT))
    optimizer = adamw("bfloat16")
    start = optimizer.init({"kernel": large})
    _, state = second_moment_after(1, optimizer, large, start)
    moment, _ = second_moment_after(1500, optimizer, small, state)
    _, exact_state = second_moment_after(
        1, adamw("float32"), large, adamw("float32").init({"kernel": large})
    )
    exact, _ = second_moment_after(1500, adamw("float32"), small, exact_state)
    assert float(exact[0]) < 0.4e-3  # of 1e-3 at the start
    assert float(jnp.mean(moment.astype(jnp.float32))) == pytest.approx(float(exact[0]), rel=0.02)


def test_moments_take_half_the_bytes_and_the_first_update_is_the_usual_one():
    params = {"kernel": jnp.linspace(-1.0, 1.0, 64, dtype=jnp.float32)}
    gradient = jax.tree.map(jnp.sin, params)
    changes, sizes = {}, {}
    for moment_dtype in ("float32", "bfloat16"):
        optimizer = adamw(moment_dtype)
        state = optimizer.init(params)
        sizes[moment_dtype] = sum(
            leaf.nbytes for leaf in jax.tree.leaves((state[0].mu, state[0].nu))
        )
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            changes[moment_dtype], after = optimizer.update(gradient, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves((after[0].mu, after[0].nu))} == {
            jnp.dtype(moment_dtype)
        }
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    np.testing.assert_array_equal(changes["bfloat16"]["kernel"], changes["float32"]["kernel"])


def test_the_same_step_rounds_the_same_way_and_another_one_differently():
    gradient = jnp.full((256,), 0.3, jnp.float32)
    optimizer = adamw("bfloat16")
    start = optimizer.init({"kernel": gradient})
    later = (start[0]._replace(count=jnp.int32(5)), *start[1:])
    first, again, other = (
        np.asarray(second_moment_after(1, optimizer, gradient, state)[0], np.float32)
        for state in (start, start, later)
    )
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first)) == 2
    assert not np.array_equal(first, other)
