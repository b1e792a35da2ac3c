"""The command line: help, errors, one real run with a signal, two processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ivl_jax.config import MeshConfig, config_to_toml, load_config
from tests.fast_compilation import FAST_COMPILATION
from tests.training.conftest import tiny_config, tiny_pair

__all__ = ["tiny_config", "tiny_pair"]


def start(project_root, *arguments, environment=None):
    """train.py as a user starts it, on one CPU device."""
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=project_root,
        env=os.environ | {"XLA_FLAGS": FAST_COMPILATION} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_help_is_fast_complete_and_needs_no_jax(project_root):
    code = (
        "import sys, time; t = time.perf_counter(); sys.argv = ['train.py', '--help']\n"
        "import train\n"
        "try: train.main()\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules\n"
        "print('seconds', time.perf_counter() - t)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, check=True
    )
    for flag in ("--config", "--resume", "--optimizer.learning-rate", "--penalty.kind"):
        assert flag in done.stdout
    # 0.4 s on an idle core; the bound leaves room for a busy one.
    assert float(done.stdout.split()[-1]) < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a config: train.py --config configs/debug.toml"),
        (
            ["--config", "configs/absent.toml"],
            "no config file at configs/absent.toml; this folder has: debug.toml,",
        ),
        (
            ["--config", "configs/debug.toml", "--data.train", "a.jsonl", "--data.train=b.jsonl"],
            "--data.train is given 2 times; give it once, with all values: --data.train A B",
        ),
        (["--config", "configs/debug.toml", "--step.batch-siz", "3"], "step.batch-siz"),
        (["--config", "configs/debug.toml", "--step.micro-batches", "3"], "does not divide"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_status_2(project_root, arguments, message):
    status, output = finish(start(project_root, *arguments))
    assert status == 2
    assert message in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_run_stops_at_sigterm_and_its_printed_command_finishes_it(
    project_root, tiny_config, tmp_path
):
    config_file = tmp_path / "tiny.toml"
    # Ten checkpoints take long enough that the signal comes before the end.
    config = replace(
        tiny_config,
        step=replace(tiny_config.step, max_steps=40),
        logging=replace(tiny_config.logging, checkpoint_every=4, evaluate_every=0),
    )
    config_file.write_text(config_to_toml(config))
    flags = ["--optimizer.learning-rate", "3e-4"]
    process = start(project_root, "--config", str(config_file), *flags)
    metrics = Path(config.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status == 75
    assert "stopped by SIGTERM" in output
    command = next(line.strip() for line in output.splitlines() if "--resume" in line)
    assert load_config(f"{config.run_dir}/config.toml").optimizer.learning_rate == 3e-4
    python, script, *arguments = command.split()
    assert (python, script) == ("python", "train.py")
    status, output = finish(start(project_root, *arguments))
    assert status == 0, output
    assert "step 40/40" in output
    assert "value folder" in output
    status, output = finish(start(project_root, "--config", str(config_file), *flags))
    assert status == 1
    assert "already contains a run" in output


@pytest.mark.slow
def test_two_processes_train_as_one(project_root, tiny_config, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config_file = tmp_path / "tiny.toml"
    config_file.write_text(
        config_to_toml(replace(tiny_config, mesh=MeshConfig(data=1, fsdp=-1), distributed=True))
    )
    processes = [
        start(
            project_root,
            "--config",
            str(config_file),
            environment={
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]
    (status, output), (other_status, other_output) = [finish(process) for process in processes]
    assert (status, other_status) == (0, 0), output + other_output
    assert "step 6/6" in output
    assert "step" not in other_output
    alone = tmp_path / "alone"
    flags = ["--run-dir", str(alone), "--no-distributed"]
    status, output = finish(start(project_root, "--config", str(config_file), *flags))
    assert status == 0, output
    losses = []
    for folder in (Path(tiny_config.run_dir), alone):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([float(line.split('"nll": ')[1].split(",")[0]) for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
