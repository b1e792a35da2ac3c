"""Several processes that compute as one, each with its own devices.

In: the config's `[processes]`, environment variables, or a cluster that JAX knows. Out: this
process is one of them, and ends when another one is lost.
"""

import atexit
import contextlib
import ctypes
import itertools
import logging
import os
import platform
import re
from collections.abc import Iterator
from typing import Any

import jax

from ivl_jax.command_line.guard import ends_at_once
from ivl_jax.config import ConfigError, ProcessesConfig
from ivl_jax.processes.link import CoordinatorLink
from ivl_jax.processes.watch import PeerWatch

logger = logging.getLogger(__name__)

_STATUS = re.compile(
    "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN):"
)
# What one process may come to by itself, whatever the others do.
_OWN_FAULT = re.compile("(RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED):")
# How many processes were started together: by hand, by srun, by Open MPI.
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

_links: list[CoordinatorLink] = []
_watches = itertools.count()


@contextlib.contextmanager
def joined_processes(options: ProcessesConfig, *, remedy: str) -> Iterator[None]:
    """Be one of several processes; while inside, end when another one is lost.

    When another process is killed, preempted without notice, stalled, or ends with an error, this
    one writes one line and ends with status 76.

    Args:
        options: how the processes find each other, and how long they wait.
        remedy: ends that line: how to resume.

    Raises:
        ConfigError: the others cannot be found.
    """
    join_processes(options)
    if jax.process_count() == 1:
        yield
        return
    client = coordination_client()
    for link in _links:
        link.hold(True)
    watch = PeerWatch(
        client,
        name=f"ivl_jax/watch{next(_watches)}",
        index=jax.process_index(),
        count=jax.process_count(),
        timeout=options.heartbeat_timeout,
        host=platform.node(),
        remedy=remedy,
        link_lost=lambda: any(link.lost.is_set() for link in _links),
    )
    try:
        yield
        client.wait_at_barrier(f"ivl_jax/finished{next(_watches)}", options.shutdown_timeout * 1000)
    except BaseException as error:
        if _may_be_anothers(error):
            # A collective fails when another process is gone: if so, the watch ends this one.
            watch.wait_for_verdict()
        lines = str(error).splitlines() or [type(error).__name__]
        watch.leave(f"ended with an error: {lines[0][:200]}")
        _skip_shutdown()
        raise
    watch.stop()
    for link in _links:
        link.hold(False)


def join_processes(options: ProcessesConfig) -> None:
    """Join the other processes.

    Args:
        options: how to find them; what it leaves open is taken from `JAX_COORDINATOR_ADDRESS`,
            `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, else from the cluster.

    Raises:
        ConfigError: they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    # Gloo pairs collectives by the order they come in; two programs in flight may swap theirs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    address, count, index = _find_processes(options)
    if index:
        _links.append(CoordinatorLink(address))
    try:
        jax.distributed.initialize(
            coordinator_address=_links[-1].address if index else address,
            num_processes=count,
            process_id=index,
            initialization_timeout=options.initialization_timeout,
            # Longer than the watch's own, which must be first: JAX's ends in a C++ abort.
            heartbeat_timeout_seconds=3 * options.heartbeat_timeout + 30,
            shutdown_timeout_seconds=options.shutdown_timeout,
        )
    except (ValueError, RuntimeError) as error:
        _skip_shutdown()
        raise ConfigError(
            f"distributed = true, but process {index} of {count} could not join the others at "
            f"{address} within {options.initialization_timeout} s "
            f"(processes.initialization_timeout): {str(error).splitlines()[0]}"
        ) from error
    if index > 0:
        # One process talks; the others only when something is wrong.
        logging.getLogger("ivl_jax").setLevel(logging.ERROR)


def require_one_process(what: str) -> None:
    """Check that this is not one of several processes.

    Args:
        what: what runs in one process only, to begin the message.

    Raises:
        ConfigError: it is one of several.
    """
    told = [os.environ.get(name, "") for name in _COUNTS]
    count = max(jax.process_count(), *(int(number) for number in told if number.isdigit()), 1)
    if count > 1:
        raise ConfigError(
            f"{what} runs in one process, and this is one of {count}: start it once, on one host "
            "and outside srun or mpirun, without JAX_NUM_PROCESSES"
        )


def _find_processes(options: ProcessesConfig) -> tuple[str, int, int]:
    """The coordinator's address, the number of processes and this one's index."""
    address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count: Any = options.num_processes or os.environ.get("JAX_NUM_PROCESSES")
    index: Any = options.process_id
    if index is None:
        index = os.environ.get("JAX_PROCESS_ID")
    try:
        if None in (address, count, index):
            address, count, index, _ = _ask_cluster(
                address, count, index, options.initialization_timeout
            )
        if address and None not in (count, index) and 0 <= int(index) < int(count):
            if re.fullmatch(r".+:\d+", address):
                return address, int(count), int(index)
            raise ValueError(f"the coordinator's address is {address!r}, not HOST:PORT")
        problem = f"found coordinator address {address}, {count} processes, process id {index}"
    except (ValueError, RuntimeError, OSError) as error:
        problem = str(error)
    raise ConfigError(
        f"distributed = true, but the processes are not known: {problem}; outside a cluster that "
        "JAX knows, set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, "
        "or the same in [processes]: coordinator_address, num_processes and process_id"
    )


def _ask_cluster(address: Any, count: Any, index: Any, timeout: int) -> Any:
    # Not public, but `jax.distributed.initialize` tells nobody the address it found.
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(
        address, count, index, None, None, timeout
    )


def coordination_client() -> Any:
    """JAX's client of the coordination service; Orbax uses it too, for want of a public name."""
    from jax._src import distributed

    return distributed.global_state.client


def _may_be_anothers(error: BaseException | None) -> bool:
    """Whether a computation or a barrier of JAX failed, perhaps as the cause of another error.

    Not all are JaxRuntimeErrors: reading an array whose collective failed is a ValueError. No lost
    process is the cause of a lack of memory, or of a program that cannot be compiled.
    """
    while error is not None:
        if _OWN_FAULT.match(str(error)):
            return False
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _skip_shutdown() -> None:
    """Do not wait for the other processes when the interpreter ends: they are gone, or will be."""
    from jax._src import api, distributed

    ends_at_once.set()
    atexit.unregister(api.clean_up)
    state = distributed.global_state
    for part in (state.client, state.service, state.preemption_sync_manager):
        # Never destroyed: to destroy the service is an error for its client, which aborts.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))
