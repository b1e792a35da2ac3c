"""A training loop of a few lines that does what ours does around checkpoints; run as a script.

`python tiny_training.py RUN_DIR [--resume]`: 24 steps of AdamW on a small regression, the state
donated, a checkpoint every 2 steps, metrics.jsonl a line a step.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivl_jax.checkpoint import TrainCheckpointer

STEPS, SAVE_EVERY, WIDTH = 24, 2, 256
OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))


class State(NamedTuple):
    """The train state."""

    step: jax.Array
    params: dict[Any, Any]
    opt_state: Any
    key: jax.Array


class Rows:
    """Random rows with a position that can be saved."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def __next__(self) -> np.ndarray:
        return self._random.normal(size=(8, WIDTH)).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        return self._random.bit_generator.state

    def set_state(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state


def make_state() -> State:
    """Make the state of step 0."""
    key = jax.random.key(0)
    params = {
        "layers": {
            i: {"kernel": jax.random.normal(jax.random.fold_in(key, i), (WIDTH, WIDTH)) / 16}
            for i in range(4)
        }
    }
    return State(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), key)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
    """Take one step, with noise from the state's key."""

    def loss_of(params: dict[Any, Any]) -> jax.Array:
        x = rows + 0.1 * jax.random.normal(jax.random.fold_in(state.key, state.step), rows.shape)
        for i in range(4):
            x = jnp.tanh(x @ params["layers"][i]["kernel"])
        return jnp.mean((x - rows) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, opt_state, state.key), loss


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    run_dir: Path = arguments.run_dir
    if run_dir.exists() and not arguments.resume:
        sys.exit(f"{run_dir} exists")
    run_dir.mkdir(exist_ok=True)
    rows = Rows()
    with (
        TrainCheckpointer(run_dir / "checkpoints", keep=2) as checkpointer,
        open(run_dir / "metrics.jsonl", "ab") as metrics,
    ):

        def save(state: State, loss: float) -> None:
            metrics.flush()
            checkpointer.save(
                state,
                data_state=rows.get_state(),
                run_metadata={"metrics_bytes": metrics.tell()},
                metrics={"nll": loss},
            )

        if arguments.resume and checkpointer.has_started():
            restored = checkpointer.restore(jax.eval_shape(make_state))
            state = restored.state
            rows.set_state(restored.data_state)
            metrics.truncate(restored.run_metadata["metrics_bytes"])
            metrics.seek(0, 2)
            say(f"goes on from step {restored.step}")
        elif metrics.tell():
            sys.exit(f"{run_dir} has metrics but no checkpoint")
        else:
            say("begins")
            state = make_state()
            save(state, 9.0)
            checkpointer.wait_until_finished()
        while (step := int(state.step)) < STEPS:
            state, loss = train_step(state, jnp.asarray(next(rows)))
            record = {"step": step + 1, "loss": float(loss)}
            metrics.write(f"{json.dumps(record)}\n".encode())
            time.sleep(0.02)
            if (step + 1) % SAVE_EVERY == 0:
                save(state, float(loss))
    say("finished")


if __name__ == "__main__":
    main()
