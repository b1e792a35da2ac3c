"""One of two processes of a distributed run that saves, loses a bit, restores and exports.

`python two_processes.py INDEX PORT FOLDER`, run by test_two_processes.py.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from ivl_jax.checkpoint import (
    NoUsableCheckpointError,
    TrainCheckpointer,
    ValueMetadata,
    load_value,
    save_value,
)
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import abstract_params
from ivl_jax.sharding import make_mesh, parameter_shardings
from ivl_jax.tokenizer import describe_tokenizer, load_tokenizer


class State(NamedTuple):
    """The train state."""

    step: jax.Array
    params: dict[Any, Any]
    key: jax.Array


def main(index: int, port: str, folder: Path) -> None:
    """Run this process's part."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    mesh = make_mesh(fsdp=2)
    whole = NamedSharding(mesh, PartitionSpec())
    tokenizer = load_tokenizer(folder / "tokenizer")
    arch = ArchConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 262,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )
    shapes = abstract_params(arch, vocab_rows=320)

    def make_state(step: jax.Array) -> State:
        params = jax.tree.map(
            lambda leaf: (
                (jnp.arange(leaf.size) % 251 + step).astype(leaf.dtype).reshape(leaf.shape)
            ),
            shapes,
        )
        return State(step, params, jax.random.key(step))

    places = State(whole, parameter_shardings(shapes, mesh), whole)
    compiled = jax.jit(make_state, out_shardings=places)
    born = lambda step: compiled(jnp.int32(step))  # noqa: E731
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(make_state, jnp.int32(0)),
        places,
    )

    def check(state: State, step: int) -> None:
        for got, expected in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(born(step).params), strict=True
        ):
            assert got.sharding.is_equivalent_to(expected.sharding, got.ndim)
            for mine, other in zip(
                got.addressable_shards, expected.addressable_shards, strict=True
            ):
                np.testing.assert_array_equal(mine.data, other.data)

    checkpoints = folder / "checkpoints"
    position = {"rows": "one" if index == 0 else "a much longer position of the other process"}
    with TrainCheckpointer(checkpoints, keep=2) as checkpointer:
        for step in range(4):
            checkpointer.save(
                born(step), data_state=position, run_metadata={"step": step}, metrics={"nll": step}
            )
        restored = checkpointer.restore(target)
        assert restored.step == 3
        assert restored.data_state == position
        check(restored.state, 3)
        assert checkpointer.steps() == [0, 2, 3]
    if index == 0:
        for path in (checkpoints / "3" / "state").rglob("d/*"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    multihost_utils.sync_global_devices("one bit less")
    with TrainCheckpointer(checkpoints, keep=1) as checkpointer:
        restored = checkpointer.restore(target)
        assert restored.step == 2, restored.step
        assert restored.data_state == position
        check(restored.state, 2)
        checkpointer.save(born(3), data_state=position, run_metadata={})
        checkpointer.wait_until_finished()
        multihost_utils.sync_global_devices("saved again")
        check(checkpointer.restore(target).state, 3)

    save_value(
        folder / "value",
        params=restored.state.params,
        metadata=ValueMetadata(
            architecture=arch.to_hf(),
            connection="residual",
            penalty={},
            tokenizer=describe_tokenizer(tokenizer).to_json(),
            training_base={},
            chat_template="plain",
            stop_ids=(257,),
        ),
        tokenizer=tokenizer,
    )
    value = load_value(folder / "value", mesh=mesh)
    rows = value.params["embed_tokens"]["embedding"].addressable_shards[0].data
    expected = born(2).params["embed_tokens"]["embedding"].addressable_shards[0].data
    np.testing.assert_array_equal(rows[:262], expected[:262])

    multihost_utils.sync_global_devices("value folder")
    if index == 0:
        for step in checkpointer.steps():
            (checkpoints / str(step) / "run" / "metadata").unlink()
    multihost_utils.sync_global_devices("nothing left")
    try:
        TrainCheckpointer(checkpoints, keep=1).restore(target)
    except NoUsableCheckpointError as error:
        sys.stdout.write(f"process {index} stops: {str(error).splitlines()[0]}\n")
    sys.stdout.write(f"process {index} done\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
