"""Two JAX processes load a checkpoint, each its share, and write it together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ivl_jax.model.architecture import ArchConfig
from ivl_jax.model.decoder import init_params
from ivl_jax.weights.hf_checkpoint import save_params


@pytest.mark.slow
def test_two_processes_load_their_shares_and_save_the_whole(
    arch: ArchConfig, tmp_path: Path, project_root: Path
) -> None:
    params = init_params(arch, jax.random.key(0))
    save_params(tmp_path / "model", arch, params, dtype=jnp.float32)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(project_root)}
    script = project_root / "tests" / "weights" / "two_processes.py"
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
