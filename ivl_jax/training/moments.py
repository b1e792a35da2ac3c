"""Adam's moments stored in bfloat16: 4 bytes per trained parameter instead of 8.

In: `optax.scale_by_adam`. Out: the same update rule around a smaller state.

The second moment is an average over 1 / (1 - β₂) = 1,000 steps: each step changes it by at most a
thousandth of its value downwards, and bfloat16 has 8 bits. Rounded to nearest, it would keep the
largest value it ever had, and the learning rate would stay too small (with β₂ = 0.999 it stalls
until a squared gradient exceeds twice to five times the average). It is therefore rounded
stochastically: up with a probability equal to the remainder, so that its expectation is the exact
average. The random bits are a function of step and position only, so a resumed run equals an
uninterrupted one, and every mesh gives the same numbers. The first moment changes by a tenth of the
gradient per step, and is rounded to nearest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Key


def bfloat16_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Store both moments of Adam in bfloat16; the arithmetic stays in float32.

    Args:
        adam: `optax.scale_by_adam`.

    Returns:
        A transformation whose state has the same structure.
    """

    def init(params: Any) -> Any:
        state: Any = adam.init(params)
        return state._replace(
            mu=optax.tree.cast(state.mu, jnp.bfloat16), nu=optax.tree.cast(state.nu, jnp.bfloat16)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(
            mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32)
        )
        changes, after = adam.update(updates, wide, params)
        after: Any = after
        leaves, structure = jax.tree.flatten(after.nu)
        key = jax.random.fold_in(jax.random.key(0), after.count)
        rounded = [
            round_stochastically(leaf, jax.random.fold_in(key, index))
            for index, leaf in enumerate(leaves)
        ]
        return changes, after._replace(
            mu=optax.tree.cast(after.mu, jnp.bfloat16), nu=jax.tree.unflatten(structure, rounded)
        )

    return optax.GradientTransformation(init, update)


def round_stochastically(x: Float32[Array, "*B"], key: Key[Array, ""]) -> BFloat16[Array, "*B"]:
    """Round to one of the two nearest bfloat16 numbers, at random.

    Args:
        x: any finite numbers.
        key: a typed PRNG key.

    Returns:
        Numbers whose expectation is x; those that bfloat16 can hold are returned unchanged.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    upper = (bits >> jnp.uint32(16)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
