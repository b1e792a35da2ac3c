"""What the tests of train checkpoints share: a small state, and runs that save it."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivl_jax.checkpoint import TrainCheckpointer


class State(NamedTuple):
    """Like the train state: NamedTuple, integer layer keys, optax state, typed key."""

    step: jax.Array
    params: dict[Any, Any]
    opt_state: Any
    key: jax.Array


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, 100))
)


@functools.partial(jax.jit, static_argnames="width")
def make_state(step: int, *, width: int = 16) -> State:
    key = jax.random.fold_in(jax.random.key(5), step)
    params = {
        "layers": {i: {"kernel": jax.random.normal(key, (width, 8)) + i} for i in range(2)},
        "scale": jnp.full((width,), step, jnp.bfloat16),
    }
    opt_state = jax.tree.map(lambda x: x + step, OPTIMIZER.init(params))
    return State(jnp.asarray(step, jnp.int32), params, opt_state, key)


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def plain(state: State) -> list[np.ndarray]:
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    return [np.asarray(x).view(np.uint8) if x.ndim else np.asarray(x) for x in leaves]


def assert_same(got: State, expected: State) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(plain(got), plain(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def run_metadata(step: int) -> dict[str, Any]:
    return {"metrics_bytes": 10 * step, "commit": "abc"}


def save(checkpointer: TrainCheckpointer, step: int, **metrics: float) -> bool:
    return checkpointer.save(
        make_state(step),
        data_state={"row": 4 * step},
        run_metadata=run_metadata(step),
        metrics=metrics,
    )


def saved_run(directory: Path, *steps: int, keep: int = 10) -> None:
    with TrainCheckpointer(directory, keep=keep) as checkpointer:
        for step in steps:
            save(checkpointer, step)


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
