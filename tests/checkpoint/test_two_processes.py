"""Two JAX processes save, fall back, restore and export together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_agree_on_what_is_saved_and_restored(
    tmp_path: Path, project_root: Path, tokenizer
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(project_root)}
    script = project_root / "tests" / "checkpoint" / "two_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(index), port, str(tmp_path)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output[-6000:]
        assert f"process {index} done" in output
        assert f"process {index} stops: no checkpoint" in output
