"""Training, resuming and decoding with everything on an object store."""

import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from etils import epath

from ivl_jax.folder_copies import file_names
from ivl_jax.training.loop import run
from tests.fast_compilation import FAST_COMPILATION
from tests.training.conftest import tiny_config, tiny_pair
from tests.training.runs import assert_same_run, at_step

__all__ = ["tiny_config", "tiny_pair"]


def _on_store(config, store):
    """The same run, with its directory and its data on the store."""
    data = replace(config.data, data_dir=str(store / "data"))
    return replace(config, run_dir=str(store / "run"), data=data)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_ends_as_a_local_one(
    tiny_config, store: epath.Path, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.INFO, "ivl_jax")
    short = replace(tiny_config, step=replace(tiny_config.step, max_steps=4))
    local = run(short)
    config = _on_store(short, store)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(config).interrupted
    assert "cannot be locked: make sure that no other run writes there" in caplog.text
    resumed = run(replace(config, resume=True))
    assert_same_run(local, resumed)
    names = set(file_names(store / "run"))
    assert {"config.toml", "starts.json", "weights.json", "timings.jsonl"} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert "run.lock" not in names
    assert not Path("gs:").exists(), "nothing was written to a local folder of that name"


def test_a_fine_tuned_model_is_written_last_of_all(tiny_config, store: epath.Path) -> None:
    config = _on_store(tiny_config, store)
    config = replace(
        config,
        method="sft",
        step=replace(config.step, max_steps=1),
        data=replace(config.data, validation_fraction=0.0),
    )
    result = run(config)
    assert str(result.output) == str(store / "run" / "model")
    names = {path.name for path in (store / "run" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


@pytest.mark.slow
def test_the_commands_train_resume_export_and_decode(
    project_root: Path, store: epath.Path, gcs_environment: dict[str, str], tmp_path: Path
) -> None:
    run_dir, base = store / "run", "ivl_jax/assets/family/S"

    def start(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=project_root,
            env=gcs_environment | {"XLA_FLAGS": FAST_COMPILATION},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(process: subprocess.Popen[str], status: int = 0) -> str:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        assert "Traceback" not in output
        return output

    flags = ("--config", "configs/debug.toml", "--step.max-steps", "60")
    flags += ("--logging.log-every", "1")
    places = ("--run-dir", str(run_dir), "--data.data-dir", str(store / "data"))
    training = start("train.py", *flags, *places)
    deadline = time.monotonic() + 240
    while not (run_dir / "checkpoints" / "10" / "manifest.json").exists():
        assert training.poll() is None, training.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    training.send_signal(signal.SIGINT)
    command = next(line for line in finish(training, 75).splitlines() if "--resume" in line)
    assert command.split() == [
        *("python", "train.py", "--config", f"{run_dir}/config.toml", "--resume")
    ]
    assert f"value folder: {run_dir}/value" in finish(start(*command.split()[1:]))
    local = ("--run-dir", str(tmp_path / "run"), "--data.data-dir", str(tmp_path / "data"))
    finish(start("train.py", *flags, *local))
    assert (run_dir / "metrics.jsonl").read_bytes() == (
        tmp_path / "run" / "metrics.jsonl"
    ).read_bytes()
    decode = ("infer.py", "--base", base, "--prompt", "What is", "--max-new-tokens", "8")
    texts = [
        finish(start(*decode, "--value", str(value))).splitlines()
        for value in (run_dir / "value", tmp_path / "run" / "value")
    ]
    assert "What is" not in texts[0][0]
    assert set(texts[0]) & set(texts[1]), "the same text"
    export = ("-m", "ivl_jax.checkpoint", "export-value", str(run_dir), str(store / "best"))
    assert "is in gs://" in finish(start(*export, "--step", "60"))
    assert (store / "best" / "ivl.json").read_bytes() == (
        run_dir / "value" / "ivl.json"
    ).read_bytes()
