"""Train checkpoints: exact, sealed, never lost, never silently altered, on any mesh."""

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ivl_jax.checkpoint import CheckpointSaveError, NoUsableCheckpointError, TrainCheckpointer
from ivl_jax.sharding import make_mesh
from ivl_jax.tree_compare import TreeMismatchError
from tests.checkpoint.saved_runs import (
    OPTIMIZER,
    State,
    abstract,
    assert_same,
    folders,
    make_state,
    run_metadata,
    save,
    saved_run,
)


def test_a_saved_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        assert save(checkpointer, 0)
        assert save(checkpointer, 7, nll=1.5)
    restored = TrainCheckpointer(tmp_path, keep=2).restore(abstract(make_state(0)))
    assert restored.step == 7
    assert_same(restored.state, make_state(7))
    assert restored.data_state == {"row": 28}
    assert restored.run_metadata == run_metadata(7)
    assert restored.rejected == ()
    assert jax.random.key_impl(restored.state.key) == jax.random.key_impl(make_state(7).key)


@pytest.mark.parametrize("data_state", [None, b"\x00\xff opaque", {"a": [1, {"b": "ü"}]}])
def test_the_data_position_comes_back_as_it_was(tmp_path: Path, data_state: Any) -> None:
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(make_state(0), data_state=data_state, run_metadata={})
        assert checkpointer.restore(make_state(0)).data_state == data_state


def test_a_given_step_can_be_restored(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 5, 9)
    restored = TrainCheckpointer(tmp_path, keep=2).restore(make_state(0), step=5)
    assert_same(restored.state, make_state(5))
    with pytest.raises(NoUsableCheckpointError, match=r"no step 6; it has \[0, 5, 9\]"):
        TrainCheckpointer(tmp_path, keep=2).restore(make_state(0), step=6)


def test_a_step_without_its_optimizer_state_is_filled_when_it_is_restored(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path / "part", keep=1) as checkpointer:
        left_out = {"data_state": None, "run_metadata": {}, "leave_out": ["opt_state"]}
        checkpointer.save(make_state(0), **left_out)
        checkpointer.record_metrics({"nll": 1.0})
        checkpointer.wait_until_finished()
        target = abstract(make_state(0))
        with pytest.raises(ValueError, match="has no opt_state"):
            checkpointer.restore(target)

        def fill(kept: State) -> State:
            assert kept.opt_state is None
            return kept._replace(opt_state=OPTIMIZER.init(kept.params))

        assert_same(checkpointer.restore(target, fill=fill).state, make_state(0))
    saved_run(tmp_path / "whole", 0)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in ("part", "whole")
    ]
    assert sizes[0] < 0.8 * sizes[1]  # the state is small, its manifest is not


def test_relative_paths_are_taken(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved_run(Path("runs/checkpoints"), 0)
    assert TrainCheckpointer("runs/checkpoints", keep=1).restore(make_state(0)).step == 0
    assert folders(tmp_path / "runs" / "checkpoints") == ["0"]


def test_plain_orbax_reads_the_state_as_nested_dictionaries(tmp_path: Path) -> None:
    saved_run(tmp_path, 3)
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(tmp_path / "3" / "state")
    kernel = tree["params"]["layers"]["1"]["kernel"]
    np.testing.assert_array_equal(kernel, make_state(3).params["layers"][1]["kernel"])


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(x: jax.Array) -> jax.Array:
        return x * 0 - 1

    class Big(NamedTuple):
        step: jax.Array
        params: jax.Array

    size = 8_000_000
    params = jax.block_until_ready(jnp.arange(size, dtype=jnp.float32))
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(Big(jnp.int32(0), params), data_state=None, run_metadata={})
        for _ in range(3):
            params = jax.block_until_ready(overwrite(params))
        target = Big(jnp.int32(0), jax.ShapeDtypeStruct((size,), jnp.float32))
        restored = checkpointer.restore(target)
    np.testing.assert_array_equal(restored.state.params, np.arange(size, dtype=np.float32))


def test_metadata_changed_after_save_is_stored_as_it_was(tmp_path: Path) -> None:
    metadata, position = {"list": [1]}, {"row": [1]}
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(make_state(0), data_state=position, run_metadata=metadata)
        metadata["list"].append(2)
        position["row"].append(2)
        restored = checkpointer.restore(make_state(0))
    assert restored.run_metadata == {"list": [1]}
    assert restored.data_state == {"row": [1]}


def test_saving_six_million_parameters_costs_the_loop_well_under_a_second(tmp_path: Path) -> None:
    class Big(NamedTuple):
        step: jax.Array
        params: dict[str, jax.Array]
        moments: tuple[dict[str, jax.Array], ...]

    params = {str(i): jax.random.normal(jax.random.key(i), (500, 500)) for i in range(24)}
    jax.block_until_ready(params)
    durations = []
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        for step in range(3):
            state = Big(jnp.int32(step), params, (params, params))
            start = time.perf_counter()
            checkpointer.save(state, data_state=None, run_metadata={})
            durations.append(time.perf_counter() - start)
            checkpointer.wait_until_finished()
    assert min(durations) < 0.5


def test_a_step_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        assert save(checkpointer, 4)
        assert not save(checkpointer, 4)
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.restore(make_state(0))
        assert not save(checkpointer, 4)


def test_keep_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        TrainCheckpointer(tmp_path, keep=0)


# What can go wrong while saving


def test_a_failed_seal_is_raised_and_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 0)
        checkpointer.wait_until_finished()
        monkeypatch.setattr("ivl_jax.checkpoint.together.write_manifest", disk_full)
        save(checkpointer, 1)
        with pytest.raises(
            CheckpointSaveError, match=r"step 1 could .*No space left.* steps \[0\]"
        ):
            save(checkpointer, 2)
    monkeypatch.undo()
    restored = TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))
    assert restored.step == 0
    assert [one.step for one in restored.rejected] == [1]


def test_a_failed_write_is_raised_and_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch
) -> None:
    async def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 0)
        save(checkpointer, 1)
        checkpointer.wait_until_finished()
        monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", disk_full)
        assert save(checkpointer, 2), "the error comes from the background"
        with pytest.raises(
            CheckpointSaveError, match=r"step 2 could .*No space left.* steps \[1\]"
        ):
            checkpointer.wait_until_finished()
    monkeypatch.undo()
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        restored = checkpointer.restore(make_state(0))
        assert restored.step == 1
        assert folders(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
        assert [one.step for one in restored.rejected] == [2]
        save(checkpointer, 2)
    assert folders(tmp_path) == ["2"]


# Orbax's own threads may still want to report to an event loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_while_arrays_are_written_is_one_line(tmp_path: Path) -> None:
    """The kernel refuses what a file takes beyond a limit, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 1)
        checkpointer.wait_until_finished()
        large = make_state(2, width=20_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            checkpointer.save(large, data_state=None, run_metadata=run_metadata(2))
            with pytest.raises(
                CheckpointSaveError, match=r"intact checkpoints: steps \[1\]"
            ) as raised:
                checkpointer.wait_until_finished()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    restored = TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))
    assert restored.step == 1
    assert_same(restored.state, make_state(1))


def test_metadata_that_is_not_json_is_refused_at_once(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        with pytest.raises(TypeError):
            checkpointer.save(make_state(0), data_state=None, run_metadata={"a": object()})
        with pytest.raises(TypeError):
            checkpointer.save(make_state(0), data_state={"a": object()}, run_metadata={})


def test_checkpoints_of_another_run_are_never_overwritten(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 5)
    with (
        TrainCheckpointer(tmp_path, keep=1) as checkpointer,
        pytest.raises(FileExistsError, match=r"of steps \[0, 5\]: resume that run"),
    ):
        save(checkpointer, 0)
    assert folders(tmp_path) == ["0", "5"]


def test_a_run_does_not_resume_from_an_older_checkpoint_over_newer_ones(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 5, 9)
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.restore(make_state(0), step=0)
        with pytest.raises(FileExistsError, match=r"steps \[5, 9\], not older than step 5"):
            save(checkpointer, 5)
    assert folders(tmp_path) == ["0", "5", "9"]


# Damage


def test_another_tree_is_named_path_by_path_before_arrays_are_read(
    tmp_path: Path, monkeypatch
) -> None:
    saved_run(tmp_path, 0)
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler, "restore", lambda *_, **__: pytest.fail("arrays were read")
    )
    with pytest.raises(TreeMismatchError) as raised:
        TrainCheckpointer(tmp_path, keep=1).restore(make_state(0, width=32))
    text = str(raised.value)
    assert "params.layers.0.kernel: expected float32[32, 8], got float32[16, 8]" in text
    assert "opt_state.1.0.mu.layers.1.kernel: expected float32[32, 8]" in text
    assert "config.toml" in text


def test_a_state_with_fewer_entries_than_stored_is_refused(tmp_path: Path) -> None:
    class Short(NamedTuple):
        step: jax.Array

    saved_run(tmp_path, 0)
    with pytest.raises(TreeMismatchError, match="key: expected nothing"):
        TrainCheckpointer(tmp_path, keep=1).restore(Short(jnp.int32(0)))


def sharded(state: State, mesh: Mesh) -> State:
    def place(x: jax.Array) -> jax.Array:
        spec = PartitionSpec("fsdp", "tensor") if x.ndim == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def meshes() -> dict[str, Mesh]:
    return {
        "1": make_mesh(devices=jax.devices()[:1]),
        "8 fsdp": make_mesh(fsdp=8),
        "2x2x2": make_mesh(data=2, fsdp=2, tensor=2),
        "last device": make_mesh(devices=jax.devices()[-1:]),
    }


@pytest.mark.parametrize("saved_on", ["1", "8 fsdp"])
@pytest.mark.parametrize("restored_on", ["1", "8 fsdp", "2x2x2", "last device"])
def test_a_run_restores_on_another_mesh(tmp_path: Path, saved_on: str, restored_on: str) -> None:
    state = make_state(3)
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(sharded(state, meshes()[saved_on]), data_state=None, run_metadata={})
    like = sharded(make_state(0), meshes()[restored_on])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    restored = TrainCheckpointer(tmp_path, keep=1).restore(target)
    assert_same(restored.state, state)
    for got, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True):
        assert got.sharding.is_equivalent_to(expected.sharding, got.ndim)
    kernel = restored.state.params["layers"][0]["kernel"]
    shard = kernel.addressable_shards[0].data
    devices = {"1": 1, "8 fsdp": 8, "2x2x2": 4, "last device": 1}[restored_on]
    assert shard.size * devices == kernel.size
