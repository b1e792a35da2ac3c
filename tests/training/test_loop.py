"""Whole runs on tiny models: what they leave behind, and that stopping changes nothing."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivl_jax.checkpoint import NoUsableCheckpointError, TrainCheckpointer, load_value
from ivl_jax.checkpoint.arrays import stored_leaves
from ivl_jax.config import ConfigError, MeshConfig, StepConfig, ValueConfig, load_config
from ivl_jax.training import loop
from ivl_jax.training.loop import run
from ivl_jax.training.run_directory import RunDirectoryError
from ivl_jax.training.trainer import NonFiniteLossError
from ivl_jax.weights.fingerprint import weights_fingerprint
from ivl_jax.weights.language_model import load_language_model
from tests.training.conftest import make_tiny_config
from tests.training.runs import (
    Crash,
    assert_same_run,
    at_step,
    crash,
    crash_and_resume,
    crash_at_record,
    records,
)

# make_mesh says that one of eight virtual devices is used.
pytestmark = pytest.mark.usefixtures("caplog")


@pytest.fixture(scope="module")
def whole(tiny_pair, tmp_path_factory):
    """A run that never stopped."""
    return run(make_tiny_config(tiny_pair, tmp_path_factory.mktemp("whole") / "run"))


def test_a_stopped_and_crashed_run_equals_one_that_never_stopped_bit_for_bit(
    tiny_config, tiny_pair, whole, monkeypatch
):
    assert not whole.interrupted
    assert whole.steps == whole.total_steps == 6
    check_what_a_run_leaves(make_tiny_config(tiny_pair, whole.run_dir), whole)

    config = tiny_config
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        stopped = run(config)
    assert stopped.interrupted
    assert stopped.output is None
    # It came when step 2 was saved; step 3 ends the run, and its evaluation waits for the resume.
    assert stopped.steps == 3
    assert [line["step"] for line in records(stopped.run_dir) if "held_out" in line] == [0]
    config = replace(config, resume=True)
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Crash):
            run(config)
    resumed = run(config)

    assert_same_run(resumed, whole)
    assert load_config(str(resumed.run_dir / "config.toml")) == tiny_config
    assert len(json.loads((resumed.run_dir / "starts.json").read_text())) == 3


@pytest.mark.slow
def test_rounded_moments_are_resumed_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    optimizer = replace(tiny_config.optimizer, moment_dtype="bfloat16")
    config = replace(tiny_config, optimizer=optimizer)
    never_stopped = run(replace(config, run_dir=str(tmp_path / "never_stopped")))
    assert_same_run(crash_and_resume(monkeypatch, run, config), never_stopped)


@pytest.mark.slow
def test_dying_with_half_a_record_again_and_again_leaves_the_bytes_of_one_run(
    tiny_config, whole, monkeypatch
):
    """Records: 0 held out · 1 · 2 · 3 · 3 held out · 4 · 5 · 6 · 6 held out; saved: 0, 2, 4, 6."""
    config = tiny_config
    for steps_saved, record in [([], 1), ([0], 2), ([0, 2], 3), ([0, 2], 3), ([0, 2, 4], 4)]:
        with monkeypatch.context() as patch:
            crash_at_record(patch, record)
            with pytest.raises(Crash):
                run(config)
        checkpoints = TrainCheckpointer(f"{config.run_dir}/checkpoints", keep=3)
        assert checkpoints.steps() == steps_saved
        config = replace(tiny_config, resume=True)
    assert_same_run(run(config), whole)


def test_a_second_process_is_turned_away_and_changes_nothing(tiny_config, whole, monkeypatch):
    refused = []

    def intrude():
        with pytest.raises(RunDirectoryError, match=r"is in use: process \d+ on ") as raised:
            run(replace(tiny_config, resume=True))
        refused.append(raised)

    at_step(monkeypatch, 3, intrude)
    assert_same_run(run(tiny_config), whole)
    assert refused


@pytest.mark.parametrize("lost", ["a few bytes", pytest.param("half", marks=pytest.mark.slow)])
def test_lost_records_are_computed_again_from_a_checkpoint_that_fits(
    tiny_config, whole, monkeypatch, lost, caplog
):
    with monkeypatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(Crash):
            run(tiny_config)
    metrics = Path(tiny_config.run_dir) / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    # Records: 0 held out · 1 · 2 · 3 · 3 held out · 4 · 5 · 6; step 4 was saved after the sixth.
    assert len(lines) == 8
    content = b"".join(lines[:6])[:-5] if lost == "a few bytes" else b"".join(lines[:2])
    metrics.write_bytes(content)
    resumed = run(replace(tiny_config, resume=True))
    assert f"step 4: {metrics} has {len(content)} bytes" in caplog.text
    assert f"resuming from step {2 if lost == 'a few bytes' else 0}" in caplog.text
    assert_same_run(resumed, whole)


def test_records_that_no_checkpoint_fits_stop_a_resume(tiny_config, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            run(tiny_config)
    metrics = Path(tiny_config.run_dir) / "metrics.jsonl"
    metrics.write_bytes(b"")
    with pytest.raises(NoUsableCheckpointError, match=r"2: .*has 0 bytes.*\n.*0: .*has 0 by"):
        run(replace(tiny_config, resume=True))


def test_one_altered_bit_of_a_base_stops_a_resume_and_altered_tokens_are_made_again(
    tiny_config, tiny_pair, whole, monkeypatch, tmp_path, caplog
):
    shutil.copytree(tiny_pair / "base", tmp_path / "base")
    data = replace(tiny_config.data, data_dir=str(tmp_path / "cache"))
    base = replace(tiny_config.base, path=str(tmp_path / "base"))
    config = replace(tiny_config, data=data, base=base)
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Crash):
            run(config)
    weights = tmp_path / "base" / "model.safetensors"
    _flip_a_bit(weights)
    with pytest.raises(RunDirectoryError, match="put the files back as they were") as raised:
        run(replace(config, resume=True))
    assert f"base.path = {tmp_path / 'base'}: fingerprint " in str(raised.value)
    _flip_a_bit(weights)
    files = (tmp_path / "cache").rglob("tokens.bin")
    tokens = max(files, key=lambda path: path.stat().st_size)  # those trained on
    original = tokens.read_bytes()
    _flip_a_bit(tokens)
    caplog.set_level("INFO", logger="ivl_jax")
    resumed = run(replace(config, resume=True))
    assert "tokens.bin: altered" in caplog.text
    assert tokens.read_bytes() == original
    assert_same_run(resumed, whole)


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_step_0_is_saved_without_optimizer_state_and_resumed_to_the_same_bits(
    tiny_config, whole, monkeypatch
):
    with monkeypatch.context() as patch:
        at_step(patch, 1, crash)
        with pytest.raises(Crash):
            run(tiny_config)
    (folder,) = (Path(tiny_config.run_dir) / "checkpoints").iterdir()
    stored = {name.split(".")[0] for name in stored_leaves(folder / "state")}
    assert (folder.name, stored) == ("0", {"step", "params", "key"})
    assert_same_run(run(replace(tiny_config, resume=True)), whole)


def check_what_a_run_leaves(config, result):
    held_out = [record for record in records(result.run_dir) if "held_out" in record]
    assert [record["step"] for record in held_out] == [0, 3, 6]
    steps = [record for record in records(result.run_dir) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "nll", "accuracy", "penalty", "mean_abs_value", "gradient_norm"} < set(steps[0])
    assert len({record["held_out"]["base_nll"] for record in held_out}) == 1
    assert held_out[-1]["held_out"] == result.held_out
    assert result.held_out["nll"] < held_out[0]["held_out"]["nll"]
    assert load_config(str(result.run_dir / "config.toml")) == config
    assert list((result.run_dir / "tensorboard").iterdir())
    timings = (result.run_dir / "timings.jsonl").read_text().splitlines()
    assert {"step", "seconds_per_step", "tokens_per_second"} == set(json.loads(timings[0]))
    value = load_value(result.output)
    assert value.metadata.steps == 6
    assert value.metadata.chat_template == "plain"
    base = config.base.path
    found = weights_fingerprint(Path(base))
    assert value.metadata.training_base == {"name": base, "fingerprint": found}
    assert set(value.tokenizer_info.eos_ids) <= set(value.stop_ids)


def test_an_existing_run_is_an_error_that_says_how_to_resume(tiny_config, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda *_: crash())
    with pytest.raises(Crash):
        run(tiny_config)
    with pytest.raises(RunDirectoryError, match=r"--config .*config\.toml --resume"):
        run(tiny_config)
    changed = replace(tiny_config, resume=True, seed=1)
    with pytest.raises(ConfigError, match=r"seed was 0, now 1"):
        run(changed)
    # What only says where and how to compute may change; nothing was saved, so it starts again.
    moved = replace(tiny_config, resume=True, mesh=MeshConfig(data=2, fsdp=1))
    with pytest.raises(Crash):
        run(moved)


def test_a_folder_that_is_not_a_run_is_never_written_to(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        run(replace(tiny_config, resume=True))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_lost_checkpoints_stop_a_resume(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda *_: crash())
    with pytest.raises(Crash):
        run(tiny_config)
    monkeypatch.undo()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    with pytest.raises(RunDirectoryError, match="records 5 steps"):
        run(replace(tiny_config, resume=True))
    assert records(tmp_path / "run") == [{"step": 5, "loss": 1.0}]


def test_a_non_finite_loss_names_step_and_rows_and_keeps_the_last_good_checkpoint(tiny_config):
    optimizer = replace(tiny_config.optimizer, learning_rate=1e30, schedule="constant")
    logging = replace(tiny_config.logging, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError) as caught:
        run(replace(tiny_config, optimizer=optimizer, logging=logging))
    assert "step 2" in str(caught.value)
    assert "rows.jsonl:" in str(caught.value)
    checkpoints = TrainCheckpointer(f"{tiny_config.run_dir}/checkpoints", keep=3)
    assert "last good checkpoint is step 1" in str(caught.value)
    assert checkpoints.steps() == [0, 1]


def test_a_zeroed_head_starts_as_the_base_on_eight_devices_with_stacked_layers(tiny_config):
    config = replace(
        tiny_config,
        value=ValueConfig(init="base", layout="fsdp"),
        base=replace(tiny_config.base, layout="tensor"),
        step=StepConfig(max_steps=2, batch_size=4, scan_layers=True, remat="full"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )
    result = run(config)
    start = records(result.run_dir)[0]["held_out"]
    assert start["nll"] == start["base_nll"]
    assert start["mean_abs_value"] == 0.0
    assert result.held_out["nll"] != start["nll"]
    value = load_value(result.output)
    assert value.arch.tie_word_embeddings is False
    assert sorted(value.params["layers"]) == [0, 1]


def losses(result):
    return [line["loss"] for line in records(result.run_dir) if "loss" in line]


def in_int8(config):
    return replace(config, base=replace(config.base, param_dtype="int8"))


def test_a_value_network_learns_nearly_the_same_beside_a_base_in_int8(tiny_config, whole):
    found, exact = losses(run(in_int8(tiny_config))), losses(whole)
    assert found != exact
    np.testing.assert_allclose(found[:2], exact[:2], rtol=0.01)
    assert found[-1] == pytest.approx(exact[-1], rel=0.05)


@pytest.mark.slow
def test_a_base_in_int8_is_split_over_a_mesh_with_its_layers_stacked(tiny_config, tmp_path):
    step = StepConfig(max_steps=2, batch_size=4, scan_layers=True)
    exact = replace(tiny_config, step=step, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    near = replace(in_int8(exact), run_dir=str(tmp_path / "int8"))
    found, expected = losses(run(near)), losses(run(exact))
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=0.01)


def fine_tuning(config):
    step = StepConfig(max_steps=4, batch_size=4, scan_layers=True, compute_dtype="bfloat16")
    return replace(config, method="sft", step=step)


def test_fine_tuning_alone_takes_the_same_loop_and_leaves_a_model_folder(tiny_config):
    result = run(fine_tuning(tiny_config))
    assert "base_nll" not in result.held_out
    assert [line["step"] for line in records(result.run_dir) if "loss" in line] == [1, 2, 3, 4]
    model = load_language_model(str(result.output))
    before = load_language_model(tiny_config.base.path)
    assert model.tokenizer_info.fingerprint == before.tokenizer_info.fingerprint
    moved = np.abs(
        np.asarray(model.params["lm_head"]["kernel"] - before.params["lm_head"]["kernel"])
    )
    assert moved.max() > 1e-3


@pytest.mark.slow
def test_fine_tuning_resumes_to_the_bytes_of_a_run_that_never_stopped(
    tiny_config, tmp_path, monkeypatch
):
    config = fine_tuning(tiny_config)
    result = run(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            run(stopped)
    resumed = run(replace(stopped, resume=True))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (resumed.run_dir / name).read_bytes() == (result.run_dir / name).read_bytes()


def test_a_profile_holds_the_marked_steps(tiny_config, tmp_path):
    step = StepConfig(max_steps=4, batch_size=4)
    run(replace(tiny_config, step=step, profile=str(tmp_path / "profile")))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"train" in content
    assert b"step_num" in content


def test_scratch_initialisation_depends_on_the_seed_alone(tiny_config, tmp_path):
    step = StepConfig(max_steps=1, batch_size=4)
    value = replace(tiny_config.value, init="scratch")
    first = replace(tiny_config, value=value, step=step)
    results = [
        run(replace(first, run_dir=str(tmp_path / name), mesh=mesh))
        for name, mesh in (("one", first.mesh), ("four", MeshConfig(data=2, fsdp=2)))
    ]
    starts = [records(result.run_dir)[0]["held_out"]["nll"] for result in results]
    assert starts[0] == pytest.approx(starts[1], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": StepConfig(batch_size=3, max_steps=1), "mesh": MeshConfig(fsdp=2)}, "multiple"),
        ({"mesh": MeshConfig(data=16, fsdp=1)}, "8 device"),
        ({"run_dir": ""}, "run_dir is empty"),
    ],
)
def test_what_cannot_work_is_reported_before_anything_is_read(
    tiny_config, monkeypatch, change, message
):
    monkeypatch.setattr(loop, "choose_models", lambda *_: crash())
    with pytest.raises(ConfigError, match=message):
        run(replace(tiny_config, **change))


def test_rows_longer_than_the_context_are_an_error_that_names_the_model(tiny_config):
    data = replace(tiny_config.data, max_length=65)
    with pytest.raises(ConfigError, match=r"max_length = 65 .*base: 64"):
        run(replace(tiny_config, data=data))
