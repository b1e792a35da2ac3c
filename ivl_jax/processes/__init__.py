"""Several processes that compute as one: joining, watching each other, ending together."""

from ivl_jax.processes.exchange import all_texts, gather_texts
from ivl_jax.processes.joining import (
    join_processes,
    joined_processes,
    require_one_process,
)
from ivl_jax.processes.watch import LOST_PROCESS

__all__ = [
    "LOST_PROCESS",
    "all_texts",
    "gather_texts",
    "join_processes",
    "joined_processes",
    "require_one_process",
]
