"""What a run will need is logged before it is allocated, and what cannot fit is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from etils import epath

from ivl_jax.config import ConfigError, LoggingConfig
from ivl_jax.devices import host_memory
from ivl_jax.training import limits, loop
from ivl_jax.training.limits import DiskUse, check_disk, disk_use
from ivl_jax.training.loop import run
from ivl_jax.training.step import TrainState
from tests.training.runs import crash

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")


def shapes(parameters: int) -> TrainState:
    weight = jax.ShapeDtypeStruct((parameters,), "float32")
    scalar = jax.ShapeDtypeStruct((), "int32")
    key = jax.eval_shape(lambda: jax.random.key(0))
    return TrainState(scalar, {"w": weight}, (scalar, {"w": weight}, {"w": weight}), key)


@pytest.mark.parametrize(
    ("steps", "every", "keep", "saving", "kept", "best"),
    [
        (8, 8, 3, "01", "01", 0),
        (8, 8, 1, "01", "1", 1),
        (20, 4, 1, "11", "1", 1),
        (20, 4, 3, "1111", "111", 1),
        (9, 4, 3, "0111", "111", 1),
        (9, 4, 9, "0111", "0111", 0),
    ],
)
def test_disk_use_counts_checkpoints(steps, every, keep, saving, kept, best) -> None:
    """0 stands for the checkpoint of step 0, without moments; 1 for a later one."""
    options = LoggingConfig(checkpoint_every=every, keep_checkpoints=keep)
    use = disk_use(options, shapes(1000), total_steps=steps)
    assert (use.first, use.checkpoint, use.output) == (4000 + 12, 12000 + 16, 4000)
    sizes = {"0": use.first, "1": use.checkpoint}
    assert use.saving == sum(sizes[one] for one in saving)
    assert use.kept == sum(sizes[one] for one in kept)
    assert use.best == best * use.checkpoint


def test_a_run_writes_what_was_announced(tiny_config, caplog) -> None:
    caplog.set_level("INFO", logger="ivl_jax")
    said = []
    original = limits.check_disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "check_disk", lambda use, path: said.append(use) or original(use, path))
        run(tiny_config)
    (use,) = said
    found = sum(
        path.stat().st_size
        for name in ("checkpoints", "value/params")
        for path in (Path(tiny_config.run_dir) / name).rglob("*")
        if path.is_file()
    )
    assert f"everything at once at most {use.most / 1e6:,.2f} MB" in caplog.text
    # Each of the five folders has some 25 kB of metadata, which weigh nothing in a real run.
    assert 0.5 * use.most < found < use.most + 200_000


def test_a_disk_that_cannot_hold_the_run_is_reported_before_it_is_written(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    use = DiskUse(first=10, checkpoint=30, output=10, saving=100, kept=70, best=30)
    assert use.most == 130
    for free, there, outcome in ((130, 0, ""), (90, 40, ""), (100, 0, "warning"), (99, 0, "error")):
        (tmp_path / "there").write_bytes(bytes(there))
        caplog.clear()
        disk = (1000, 0, free)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, disk=disk: shutil._ntuple_diskusage(*disk)
        )
        if outcome == "error":
            with pytest.raises(OSError, match=r"the disk is 0\.00 MB.*keep_checkpoints"):
                check_disk(use, epath.Path(tmp_path))
        else:
            check_disk(use, epath.Path(tmp_path))
            assert ("the disk is" in caplog.text) == (outcome == "warning")


@pytest.mark.parametrize("micro_batches", [1, 10**9])
def test_a_huge_batch_is_refused_before_anything_is_allocated(
    tiny_config, monkeypatch, micro_batches
) -> None:
    monkeypatch.setattr(loop, "prepare_data", lambda *_: crash())
    step = replace(tiny_config.step, batch_size=10**9, micro_batches=micro_batches)
    with pytest.raises(ConfigError, match=r"step.batch_size = 1,000,000,000: .*816.00 GB"):
        run(replace(tiny_config, step=step))


def test_a_batch_whose_gradient_cannot_fit_a_device_names_the_remedy(
    tiny_config, monkeypatch
) -> None:
    monkeypatch.setattr(loop, "prepare_data", lambda *_: crash())
    memory = host_memory()
    assert memory is not None
    # 48 tokens of 17 bytes fit the host; the layer's inputs, 48 · 16 · 4 bytes, do not fit beside.
    rows = int(memory // (48 * (17 + 64)) + 1000)
    step = replace(tiny_config.step, batch_size=rows, micro_batches=1)
    with pytest.raises(ConfigError, match=r"raise step\.micro_batches"):
        run(replace(tiny_config, step=step))
