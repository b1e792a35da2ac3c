"""A part of a program that runs only under a condition, and changes its arrays in place.

In: a condition on device, a function, and what it changes. Out: the same, changed or as it was.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

_Carry = TypeVar("_Carry")


def when(condition: Bool[Array, ""], change: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """`change(carry)` under a condition, else `carry`; caches in it are changed in place.

    A loop of one turn: through `lax.cond` and `lax.switch` XLA copies a cache twice on CPU.

    Args:
        condition: whether to change it.
        change: returns arrays of the same shapes and dtypes.
        carry: a pytree of arrays.

    Returns:
        The pytree afterwards.
    """

    def once(loop: tuple[Array, _Carry]) -> tuple[Array, _Carry]:
        return jnp.asarray(False), change(loop[1])

    return jax.lax.while_loop(lambda loop: loop[0], once, (condition, carry))[1]
