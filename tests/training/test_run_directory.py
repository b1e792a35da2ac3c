"""Record files that can be cut back, what a start writes down, and who may write."""

import json
import os
import socket
from dataclasses import replace

import pytest
from etils import epath

from ivl_jax.config import ConfigError, LoggingConfig, OptimizerConfig, TrainConfig
from ivl_jax.text_files import MalformedFileError
from ivl_jax.training.record_file import RecordFile, RecordsError
from ivl_jax.training.run_directory import RunDirectory, RunDirectoryError


def test_records_are_cut_back_to_a_size_with_a_half_written_line(tmp_path):
    file = RecordFile(epath.Path(tmp_path / "metrics.jsonl"))
    file.append({"step": 1})
    size = file.flush()
    file.append({"step": 2})
    with (tmp_path / "metrics.jsonl").open("ab") as raw:
        raw.write(b'{"step": 3, "lo')
    assert file.last_step() == 2
    file.cut(size)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.append({"step": 2})
    assert file.last_step() == 2


def test_missing_records_are_an_error_that_says_how_many(tmp_path):
    file = RecordFile(epath.Path(tmp_path / "metrics.jsonl"))
    file.append({"step": 1})
    with pytest.raises(RecordsError, match=r"has 12 bytes.*had 40"):
        file.cut(40)


def test_an_absent_file_has_no_records(tmp_path):
    file = RecordFile(epath.Path(tmp_path / "metrics.jsonl"))
    assert (file.flush(), file.last_step()) == (0, -1)
    file.cut(0)


def test_each_start_is_written_down_and_the_config_only_once(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"), resume=True)
    directory = RunDirectory(config.run_dir)
    directory.open(config, there=directory.check(config), weights={})
    before = (tmp_path / "run" / "config.toml").read_bytes()
    assert b"resume = false" in before
    again = replace(config, logging=LoggingConfig(log_every=3))
    assert directory.check(again) is True
    directory.open(again, there=True, weights={})
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    assert len(starts) == 2
    assert {"time", "command", "versions", "backend", "devices", "commit"} <= set(starts[0])


def test_every_difference_to_the_started_config_is_named(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"), resume=True)
    directory = RunDirectory(config.run_dir)
    directory.open(config, there=False, weights={})
    optimizer = OptimizerConfig(learning_rate=0.5, moment_dtype="bfloat16")
    changed = replace(config, seed=3, optimizer=optimizer)
    with pytest.raises(ConfigError) as caught:
        directory.check(changed)
    assert "seed was 0, now 3" in str(caught.value)
    assert "optimizer.learning_rate was 0.0001, now 0.5" in str(caught.value)
    assert "optimizer.moment_dtype was 'float32', now 'bfloat16'" in str(caught.value)
    assert directory.resume_command in str(caught.value)


def test_a_run_that_recorded_remat_as_a_boolean_resumes_under_any_policy(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"), resume=True)
    directory = RunDirectory(config.run_dir)
    directory.open(config, there=False, weights={})
    recorded = tmp_path / "run" / "config.toml"
    text = recorded.read_text()
    assert 'remat = "auto"' in text
    recorded.write_text(text.replace('remat = "auto"', "remat = true"))
    assert directory.check(config)


def test_other_library_versions_are_reported(tmp_path, caplog):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    directory = RunDirectory(config.run_dir)
    directory.open(config, there=False, weights={})
    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    starts[-1]["versions"]["jax"] = "0.0.1"
    (tmp_path / "run" / "starts.json").write_text(json.dumps(starts))
    directory.open(config, there=True, weights={})
    assert "jax was '0.0.1'" in caplog.text


def test_two_processes_never_share_a_run_directory(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    directory = RunDirectory(config.run_dir)
    with directory.claim(config) as there:
        assert there is False
        for other in (config, replace(config, resume=True)):
            with pytest.raises(RunDirectoryError) as raised, directory.claim(other):
                pass
            assert f"is in use: process {os.getpid()} on {socket.gethostname()}" in str(
                raised.value
            )
    assert not list(tmp_path.iterdir()), "a run that did not begin leaves nothing"


def test_what_a_killed_process_left_of_a_claim_is_not_a_run(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text("{}")
    with RunDirectory(config.run_dir).claim(config) as there:
        assert there is False


def test_records_are_on_the_disk_before_their_size_is_given(tmp_path, monkeypatch):
    file, synced = RecordFile(epath.Path(tmp_path / "metrics.jsonl")), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    file.append({"step": 1})
    assert file.flush() == 12
    assert synced[0] == 12
    assert len(synced) == 2, "the folder too: the file's name is in it"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_record_that_does_not_fit_on_the_disk_names_its_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        RecordFile(epath.Path(tmp_path / "metrics.jsonl")).append({"step": 1})


def test_weights_that_changed_in_the_same_place_are_named(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    directory = RunDirectory(config.run_dir)
    then = {key: {"path": key[0], "fingerprint": "a" * 64} for key in ("base.path", "value.path")}
    directory.check_weights(then)
    directory.open(config, there=False, weights=then)
    directory.check_weights(then)
    now = then | {"base.path": {"path": "models/B", "fingerprint": "b" * 64}}
    with pytest.raises(RunDirectoryError) as raised:
        directory.check_weights(now)
    said = str(raised.value)
    assert "base.path = models/B: fingerprint aaaaaaaaaaaa then, bbbbbbbbbbbb now" in said
    assert "value.path" not in said


def test_a_run_that_recorded_no_weights_records_them_when_it_is_resumed(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    directory = RunDirectory(config.run_dir)
    directory.open(config, there=False, weights={})
    (tmp_path / "run" / "weights.json").unlink()
    now = {"base.path": {"path": "B", "fingerprint": "b" * 64}}
    directory.check_weights(now)
    directory.open(config, there=True, weights=now)
    assert json.loads((tmp_path / "run" / "weights.json").read_text()) == now


@pytest.mark.parametrize("content", ["", "{", "[", "{}", "[1]", "[{}]", '[{"versions": 1}]', "\0"])
@pytest.mark.parametrize("name", ["starts.json", "weights.json"])
def test_what_earlier_starts_wrote_is_named_where_it_cannot_be_read(tmp_path, name, content):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    directory = RunDirectory(config.run_dir)
    weights = {"base.path": {"path": "B", "fingerprint": "b" * 64}}
    directory.open(config, there=False, weights=weights)
    (tmp_path / "run" / name).write_text(content)

    def start() -> None:
        directory.check_weights(weights)
        directory.open(config, there=True, weights=weights)

    with pytest.raises((MalformedFileError, RunDirectoryError), match=str(tmp_path / "run")):
        start()
