"""Starts `train.py` as the processes of one run, on this machine's CPU."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.fast_compilation import FAST_COMPILATION

_MOST_SECONDS = 300


class SeveralProcesses:
    """The processes of one run, started like a user's; all are gone when the block ends.

    Args:
        project_root: where train.py is.
        folder: for what they print.
        arguments: of train.py.
        count: number of processes.
        devices: virtual CPU devices of each.
    """

    def __init__(self, project_root: Path, folder: Path, *arguments: str, count: int, devices=1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = f"--xla_force_host_platform_device_count={devices}"
        common = {
            "XLA_FLAGS": f"{flags} {FAST_COMPILATION}",
            "PYTHONPATH": str(project_root),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{index}.txt" for index in range(count)]
        self.processes = []
        for index, output in enumerate(self._outputs):
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "train.py", *arguments],
                        cwd=project_root,
                        env={**os.environ, **common, "JAX_PROCESS_ID": str(index)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def output(self, index):
        """What a process has printed so far."""
        return self._outputs[index].read_text()

    def wait_for(self, text):
        """Wait until process 0 has printed a text."""
        deadline = time.monotonic() + _MOST_SECONDS
        while text not in self.output(0):
            assert all(process.poll() is None for process in self.processes), self._all()
            assert time.monotonic() < deadline, self._all()
            time.sleep(0.05)

    def finish(self, *indices, seconds=_MOST_SECONDS):
        """Wait for the end of these processes, or of all; their exit statuses."""
        deadline = time.monotonic() + seconds
        chosen = indices or range(len(self.processes))
        try:
            for index in chosen:
                self.processes[index].wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"process {index} is not done:\n{self._all()}") from late
        return [self.processes[index].returncode for index in chosen]

    def _all(self):
        return "\n".join(
            f"--- process {index}\n{self.output(index)[-3000:]}"
            for index in range(len(self.processes))
        )
