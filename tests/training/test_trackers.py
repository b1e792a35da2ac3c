"""Figures of a run reach every tracker that its config names; what is missing is said at once."""

import importlib
import importlib.util
import json
import struct
import time
from dataclasses import replace
from typing import Any

import pytest
from etils import epath

from ivl_jax.config import ConfigError, LoggingConfig, TrainConfig, config_to_toml
from ivl_jax.training.loop import run
from ivl_jax.training.run_directory import CONFIG_FILE
from ivl_jax.training.trackers import check_trackers
from ivl_jax.training.wandb_run import WandbRun
from tests.training.runs import crash_and_resume, records

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="the extra `wandb` is not installed"
)


def _log_records(data):
    """The records of a W&B file: LevelDB's log format behind a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block is too small for a record
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def _logged(folder):
    """The scalars of all starts of a W&B run, by step, and the ids of these starts."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    by_step, ids = {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        ids.append(file.stem.removeprefix("run-"))
        for data in _log_records(file.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            figures = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            if "step" in figures:
                by_step.setdefault(int(figures["step"]), {}).update(figures)
    return by_step, ids


@needs_wandb
def test_two_starts_are_one_run_and_a_step_may_be_logged_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / CONFIG_FILE).write_text(config_to_toml(TrainConfig(seed=3)))
    for first_step, figure in ((0, 0.5), (1, 0.25)):
        tracker = WandbRun(epath.Path(tmp_path), first_step=first_step)
        for step in (first_step + 1, first_step + 2):
            tracker.add("train", {"loss": figure}, step)
        tracker.close()
    expected = {1: 0.5, 2: 0.25, 3: 0.25}
    # The process that writes the files may end a moment after the run has.
    for _ in range(100):
        logged, ids = _logged(tmp_path)
        found = {step: row["train/loss"] for step, row in logged.items()}
        if found == expected:
            break
        time.sleep(0.1)
    assert found == expected
    assert len(ids) == 2
    assert len(set(ids)) == 1


@needs_wandb
@pytest.mark.slow
def test_a_run_that_crashed_and_resumed_shows_every_figure_in_all_trackers(
    tiny_config, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = LoggingConfig(
        log_every=1, evaluate_every=3, checkpoint_every=2, trackers=("tensorboard", "wandb")
    )
    crash_and_resume(monkeypatch, run, replace(tiny_config, logging=trackers))
    folder = tmp_path / "run"
    logged, ids = _logged(folder)
    assert len(set(ids)) == 1
    for record in records(folder):
        group, figures = (
            ("held_out", record["held_out"]) if "held_out" in record else ("train", record)
        )
        for name, value in figures.items():
            if name != "step":
                found = logged[record["step"]][f"{group}/{name}"]
                assert found == pytest.approx(value, rel=1e-6), name
    assert list((folder / "tensorboard").iterdir())


def test_without_trackers_nothing_is_written_for_them(tiny_config, tmp_path) -> None:
    step = replace(tiny_config.step, max_steps=1)
    run(replace(tiny_config, step=step, logging=LoggingConfig(log_every=1, trackers=())))
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_a_tracker_that_cannot_work_is_refused_before_anything_is_read(
    tiny_config, monkeypatch
) -> None:
    config = replace(tiny_config, logging=LoggingConfig(trackers=("wandb",)))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs the extra `wandb`: pip install"):
            run(config)
    with pytest.raises(ConfigError, match=r"logging\.trackers names one twice: wandb, wandb"):
        LoggingConfig(trackers=("wandb", "wandb"))


@needs_wandb
def test_online_without_an_api_key_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="no API key: run `wandb login`, or set WANDB_MODE=off"):
        check_trackers(("wandb",))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(("wandb",))
