"""Several processes that compute as one, each with its own devices.

In: environment variables, or a cluster that JAX knows. Out: this process is one of them.
"""

import logging
import os

import jax

from ivl_jax.config import ConfigError


def join_processes() -> None:
    """Join the other processes; clusters are detected, else three variables describe them.

    Raises:
        ConfigError: they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    # Gloo pairs collectives by the order they come in; two programs in flight may swap theirs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"distributed = true, but jax.distributed.initialize failed: {error}; outside a "
            "cluster that JAX knows, set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID"
        ) from error
    if jax.process_index() > 0:
        # One process talks; the others only when something is wrong.
        logging.getLogger("ivl_jax").setLevel(logging.ERROR)
