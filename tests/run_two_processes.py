"""Runs a script as two JAX processes of one program, on this machine's CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.fast_compilation import FAST_COMPILATION

_MOST_SECONDS = 300


def run_two_processes(script: Path, folder: Path, *, project_root: Path) -> list[str]:
    """Start `script INDEX PORT FOLDER` twice, wait, and return what each of them printed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": FAST_COMPILATION,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(project_root),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(index), port, str(folder)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=_MOST_SECONDS)[0] for process in processes]
    for index, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output[-6000:]
        assert f"process {index} done" in output
    return outputs
