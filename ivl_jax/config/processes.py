"""How the processes of a run on several hosts find and watch each other.

In: values from a TOML file or the command line. Out: a frozen dataclass whose own checks have
passed.
"""

import math
from dataclasses import dataclass

from ivl_jax.config.checks import require, require_numbers


@dataclass(frozen=True)
class ProcessesConfig:
    """With `distributed`: where the processes meet, and how long they wait for each other.

    On TPU pods, Slurm, Open MPI and Kubernetes the first three are found by JAX.
    """

    coordinator_address: str = ""
    """HOST:PORT of process 0, which the others must reach; empty: `JAX_COORDINATOR_ADDRESS`, or
    what the cluster says."""
    num_processes: int = 0
    """Number of processes; 0: `JAX_NUM_PROCESSES`, or what the cluster says."""
    process_id: int | None = None
    """This process's number, from 0; unset: `JAX_PROCESS_ID`, or what the cluster says."""
    initialization_timeout: int = 300
    """Seconds that a process waits at the start until all have joined."""
    heartbeat_timeout: int = 40
    """Seconds without a sign of life after which a process counts as lost, and all others end with
    status 76."""
    barrier_timeout: int = 300
    """Seconds that a process waits for the others while a checkpoint is saved; a save that fails in
    only one of them ends the run after this time."""
    shutdown_timeout: int = 300
    """Seconds that a process which has finished waits for the others to finish."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_numbers(self, "processes.")
        host, _, port = self.coordinator_address.rpartition(":")
        require(
            not self.coordinator_address or bool(host and port.isdigit()),
            f'processes.coordinator_address = "{self.coordinator_address}": expected HOST:PORT of '
            "process 0",
        )
        require(
            self.num_processes >= 0,
            f"processes.num_processes must be ≥ 0, got {self.num_processes}",
        )
        require(
            self.process_id is None or 0 <= self.process_id < (self.num_processes or math.inf),
            f"processes.process_id must be in [0, processes.num_processes), got {self.process_id} "
            f"with processes.num_processes = {self.num_processes}",
        )
        require(
            self.heartbeat_timeout >= 2,
            f"processes.heartbeat_timeout must be ≥ 2 seconds, got {self.heartbeat_timeout}",
        )
        for name in ("initialization_timeout", "barrier_timeout", "shutdown_timeout"):
            require(
                getattr(self, name) >= 1,
                f"processes.{name} must be ≥ 1 second, got {getattr(self, name)}",
            )
