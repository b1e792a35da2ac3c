"""Damaged and unfinished train checkpoints: named, passed over, never taken for whole ones."""

import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ivl_jax.checkpoint import NoUsableCheckpointError, TrainCheckpointer
from ivl_jax.manifest import MANIFEST_NAME, write_manifest
from tests.checkpoint.saved_runs import assert_same, folders, make_state, save, saved_run


def every_kind_of_file(directory: Path, step: int) -> list[Path]:
    return sorted(path for path in (directory / str(step)).rglob("*") if path.is_file())


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_named_and_the_step_before_is_used(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1)
    target = make_state(0)
    files = every_kind_of_file(tmp_path, 1)
    kinds = {path.name for path in files}
    assert {"_METADATA", "_sharding", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= kinds
    assert {"commit_success.txt", "metadata", MANIFEST_NAME} <= kinds
    assert any(path.parent.name == "d" for path in files), "the arrays themselves"
    for path in files:
        original = path.read_bytes()
        flip_bit(path)
        restored = TrainCheckpointer(tmp_path, keep=1).restore(target)
        assert restored.step == 0, path
        (rejected,) = restored.rejected
        assert rejected.step == 1
        name = path.relative_to(tmp_path / "1").as_posix()
        assert any(name in reason for reason in rejected.reasons), (name, rejected)
        path.write_bytes(original)
    assert TrainCheckpointer(tmp_path, keep=1).restore(target).step == 1


def test_orbax_alone_returns_altered_arrays_silently(tmp_path: Path) -> None:
    """Why the manifest exists; when this fails, Orbax has learnt to check."""
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (500, 500)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", {"kernel": kernel})
    largest = max((tmp_path / "x").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip_bit(largest)
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(tmp_path / "x")["kernel"]
    assert np.asarray(got).tobytes() != kernel.tobytes()


def test_damage_is_logged_with_file_expected_and_found(tmp_path: Path, caplog) -> None:
    saved_run(tmp_path, 0, 1)
    victim = next(path for path in every_kind_of_file(tmp_path, 1) if path.parent.name == "d")
    flip_bit(victim)
    with caplog.at_level(logging.WARNING, logger="ivl_jax"):
        TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))
    text = caplog.text
    assert "step 1" in text
    assert victim.name in text
    assert "expected SHA-256" in text
    assert "resuming from step 0" in text


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no manifest", "renamed"])
def test_an_incomplete_newest_step_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str
) -> None:
    saved_run(tmp_path, 0, 1)
    victim = next(path for path in every_kind_of_file(tmp_path, 1) if path.parent.name == "d")
    reason = {
        "truncated": "bytes, found",
        "missing file": "missing",
        "no manifest": "manifest.json is missing",
        "renamed": "the folder 2 contains step 1",
    }[damage]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "missing file":
        victim.unlink()
    elif damage == "no manifest":
        (tmp_path / "1" / MANIFEST_NAME).unlink()
    else:
        (tmp_path / "1").rename(tmp_path / "2")
    restored = TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))
    assert restored.step == 0
    (rejected,) = restored.rejected
    assert reason in rejected.reasons[0]


def test_an_unfinished_save_is_named_and_cleared_by_the_next_save(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1)
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        restored = checkpointer.restore(make_state(0))
        assert restored.step == 1
        assert restored.rejected[0].step == 4
        assert "while it was being saved" in restored.rejected[0].reasons[0]
        assert "4.orbax-checkpoint-tmp" in folders(tmp_path), "reading changes nothing"
        save(checkpointer, 2)
    assert folders(tmp_path) == ["1", "2"]


def test_when_nothing_is_usable_it_stops_and_lists_every_reason(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    flip_bit(tmp_path / "1" / "run" / "metadata")
    (tmp_path / "0" / "state" / "_METADATA").unlink()
    before = folders(tmp_path)
    with pytest.raises(NoUsableCheckpointError) as raised:
        TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))
    text = str(raised.value)
    assert "step 2: 2.orbax-checkpoint-tmp" in text
    assert "step 1: run/metadata: altered" in text
    assert "step 0: state/_METADATA: missing" in text
    assert "nothing was changed" in text
    assert folders(tmp_path) == before


def test_an_explicit_step_that_is_damaged_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1)
    flip_bit(tmp_path / "1" / "run" / "metadata")
    with pytest.raises(NoUsableCheckpointError, match="run/metadata: altered"):
        TrainCheckpointer(tmp_path, keep=1).restore(make_state(0), step=1)


def test_training_continues_over_a_damaged_step_which_is_set_aside(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1, 2)
    flip_bit(tmp_path / "2" / "run" / "metadata")
    (tmp_path / "1" / MANIFEST_NAME).unlink()
    with TrainCheckpointer(tmp_path, keep=5) as checkpointer:
        restored = checkpointer.restore(make_state(0))
        assert restored.step == 0
        save(checkpointer, 1)
        save(checkpointer, 2)
    assert folders(tmp_path) == ["0", "1", "2", "2.unusable"]
    assert_same(TrainCheckpointer(tmp_path, keep=5).restore(make_state(0)).state, make_state(2))


def test_a_half_deleted_old_step_does_not_count_as_kept(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1, 2)
    (tmp_path / "1" / "state" / "_METADATA").unlink()  # a kill while Orbax was deleting it
    with TrainCheckpointer(tmp_path, keep=3) as checkpointer:
        assert checkpointer.restore(make_state(0)).step == 2
        assert checkpointer.steps() == [0, 2]
        save(checkpointer, 3)
    assert folders(tmp_path) == ["0", "2", "3"]


def reseal(folder: Path, step: int) -> None:
    write_manifest(folder, {"step": step, "metrics": {}})


def test_the_label_must_be_the_step_of_the_state(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1)
    (tmp_path / "1").rename(tmp_path / "2")
    reseal(tmp_path / "2", 2)
    with pytest.raises(ValueError, match=r"2 has state\.step = 1, expected 2"):
        TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))


def test_positions_that_differ_are_refused_with_another_number_of_processes(tmp_path: Path) -> None:
    saved_run(tmp_path, 0)
    (tmp_path / "0" / "data" / "metadata").write_text('{"processes": [{"json": 1}, {"json": 2}]}')
    reseal(tmp_path / "0", 0)
    with pytest.raises(ValueError, match="positions of 2 processes, but this run has 1: resume"):
        TrainCheckpointer(tmp_path, keep=1).restore(make_state(0))


# Whether anything was trained


def test_a_run_killed_before_step_zero_was_sealed_has_not_started(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    assert not TrainCheckpointer(directory, keep=1).has_started()
    saved_run(directory, 0)
    assert TrainCheckpointer(directory, keep=1).has_started()
    (directory / "0" / MANIFEST_NAME).unlink()
    (directory / "0.orbax-checkpoint-tmp").mkdir()
    with TrainCheckpointer(directory, keep=1) as checkpointer:
        assert not checkpointer.has_started()
        save(checkpointer, 0)
    assert folders(directory) == ["0"]
    assert TrainCheckpointer(directory, keep=1).restore(make_state(0)).step == 0


def test_a_run_whose_later_steps_are_all_unsealed_has_started(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 4)
    for step in (0, 4):
        (tmp_path / str(step) / MANIFEST_NAME).unlink()
    checkpointer = TrainCheckpointer(tmp_path, keep=1)
    assert checkpointer.has_started()
    with pytest.raises(NoUsableCheckpointError):
        checkpointer.restore(make_state(0))


# Other trees, other meshes
