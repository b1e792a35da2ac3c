"""Which checkpoints of a run are kept, and that the last sound one is never the one deleted."""

from pathlib import Path
from typing import Any

import pytest
from etils import epath

from ivl_jax.checkpoint import NoUsableCheckpointError, TrainCheckpointer
from ivl_jax.checkpoint.export import _wanted_step
from ivl_jax.manifest import MANIFEST_NAME
from tests.checkpoint.saved_runs import abstract, folders, make_state, save, saved_run


def test_the_newest_the_one_before_and_the_best_are_kept(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        for step, nll in enumerate([float("nan"), 1.0, 3.0, 5.0, 4.0, 2.0]):
            save(checkpointer, step, nll=nll)
        assert checkpointer.steps() == [1, 4, 5]
        assert checkpointer.best_step() == 1
        assert checkpointer.latest_step() == 5
    assert folders(tmp_path) == ["1", "4", "5"]


def test_the_best_can_be_the_highest(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=1, metric="f", lower_is_better=False) as checkpointer:
        for step, value in enumerate([1.0, 9.0, 2.0, 3.0]):
            save(checkpointer, step, f=value)
        assert checkpointer.best_step() == 1
        assert checkpointer.steps() == [1, 3]


def test_the_best_to_export_is_by_what_the_newest_checkpoint_goes_by(tmp_path: Path) -> None:
    """Earlier versions went by the negative of a reward, which later ones do not record."""
    with TrainCheckpointer(tmp_path, keep=3, metric="missed_reward") as checkpointer:
        for step, reward in enumerate([0.1, 0.5]):
            save(checkpointer, step, reward=reward, missed_reward=-reward)
    later = {"keep": 3, "metric": "reward", "lower_is_better": False}
    with TrainCheckpointer(tmp_path, **later) as checkpointer:
        checkpointer.restore(abstract(make_state(0)))
        save(checkpointer, 2, reward=0.9)
        assert checkpointer.best_step() == 2
        save(checkpointer, 3, reward=0.2)
        assert checkpointer.best_step() == 2
    assert _wanted_step(epath.Path(tmp_path), "best") == 2


def test_without_a_metric_there_is_no_best(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        for step in range(4):
            save(checkpointer, step)
        assert checkpointer.best_step() is None
        assert checkpointer.steps() == [3]


def test_the_best_is_remembered_across_a_restart(tmp_path: Path) -> None:
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        for step, nll in enumerate([5.0, 1.0, 3.0]):
            save(checkpointer, step, nll=nll)
    with TrainCheckpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.restore(make_state(0))
        for step in range(3, 7):
            save(checkpointer, step, nll=2.0)
        assert checkpointer.best_step() == 1
    assert folders(tmp_path) == ["1", "5", "6"]


def test_figures_measured_after_a_restart_count_for_the_best(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    with TrainCheckpointer(directory, keep=1) as checkpointer:
        save(checkpointer, 1, nll=2.0)
        save(checkpointer, 2)
    with TrainCheckpointer(directory, keep=1) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 2
        checkpointer.record_metrics({"nll": 1.0})
        assert checkpointer.best_step() == 2
        for step in (3, 4, 5):
            save(checkpointer, step, nll=3.0)
        assert checkpointer.steps() == [2, 5]
        assert not checkpointer.restore(abstract(make_state(0)), step=2).rejected


def test_the_last_fallback_is_dropped_only_when_the_newest_is_sealed(
    tmp_path: Path, monkeypatch
) -> None:
    seen = []

    def sealed() -> set[str]:
        return {path.parent.name for path in tmp_path.glob(f"*/{MANIFEST_NAME}")}

    import ivl_jax.checkpoint.together as sealing

    original = sealing.write_manifest

    def slow(folder: Path, about: dict) -> None:
        seen.append((about["step"], sealed(), folders(tmp_path)))
        original(folder, about)

    monkeypatch.setattr(sealing, "write_manifest", slow)
    with TrainCheckpointer(tmp_path, keep=1) as checkpointer:
        for step in range(4):
            save(checkpointer, step)
    assert [(step, have) for step, have, _ in seen] == [
        (0, set()),
        (1, {"0"}),
        (2, {"1"}),
        (3, {"2"}),
    ]
    # When step 3 waits for its manifest, step 2 is all there is to fall back to.
    assert seen[-1][2] == ["2", "3"]
    assert folders(tmp_path) == ["3"]


def test_a_half_deleted_old_step_is_deleted_with_the_next_save(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 1)
    (tmp_path / "0" / MANIFEST_NAME).unlink()
    next((tmp_path / "0" / "state").rglob("d/*")).unlink()
    with TrainCheckpointer(tmp_path, keep=5) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 1
        save(checkpointer, 2)
    assert folders(tmp_path) == ["1", "2"]


def test_a_checkpoint_that_does_not_fit_is_named_and_set_aside(tmp_path: Path) -> None:
    saved_run(tmp_path, 0, 5, 9)

    def fits(run: dict[str, Any]) -> str | None:
        return None if run["metrics_bytes"] <= 50 else "records are missing"

    with TrainCheckpointer(tmp_path, keep=3) as checkpointer:
        restored = checkpointer.restore(abstract(make_state(0)), fits=fits)
        assert restored.step == 5
        assert [str(one) for one in restored.rejected] == ["step 9: records are missing"]
        assert folders(tmp_path) == ["0", "5", "9"], "reading changes nothing"
        save(checkpointer, 9)
    assert folders(tmp_path) == ["0", "5", "9", "9.unusable"]
    with pytest.raises(NoUsableCheckpointError, match=r"9: no.*\n.*5: no.*\n.*0: no"):
        TrainCheckpointer(tmp_path, keep=3).restore(make_state(0), fits=lambda run: "no")
