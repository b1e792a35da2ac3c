"""Texts that processes tell each other.

In: a text of each process. Out: the texts of all, in every process or in process 0.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from ivl_jax.processes.joining import coordination_client

# gRPC refuses messages above 4 MB.
_MOST_CHARACTERS = 1 << 20


def all_texts(text: str) -> list[str]:
    """Gather a text of every process in all of them; a collective, for the main thread only.

    Args:
        text: this process's.

    Returns:
        The texts of all processes, in their order.
    """
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(own)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def gather_texts(name: str, text: str, *, timeout: int) -> list[str]:
    """Gather a text of every process in process 0, from any thread.

    Collectives are paired by the order in which they are started, so a background thread must not
    start one. The key-value store of JAX's coordination service, which this uses, has no order.

    Args:
        name: the same in all processes, and never used before.
        text: this process's.
        timeout: seconds that process 0 waits for each of the others.

    Returns:
        In process 0 the texts of all processes in their order; in the others nothing.

    Raises:
        JaxRuntimeError: a process did not tell its text in time.
    """
    if jax.process_count() == 1:
        return [text]
    client, index = coordination_client(), jax.process_index()
    if index > 0:
        starts = range(0, len(text), _MOST_CHARACTERS)
        parts = [text[start : start + _MOST_CHARACTERS] for start in starts]
        for number, part in enumerate(parts):
            client.key_value_set(f"ivl_jax/{name}/{index}/{number}", part)
        client.key_value_set(f"ivl_jax/{name}/{index}/parts", str(len(parts)))
        return []
    texts = [text]
    for other in range(1, jax.process_count()):
        place = f"ivl_jax/{name}/{other}"
        parts = int(client.blocking_key_value_get(f"{place}/parts", timeout * 1000))
        texts.append(
            "".join(
                client.blocking_key_value_get(f"{place}/{number}", timeout * 1000)
                for number in range(parts)
            )
        )
    client.key_value_delete(f"ivl_jax/{name}/")
    return texts
