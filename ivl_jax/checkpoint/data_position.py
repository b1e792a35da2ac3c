"""Each process's position in its data, as one JSON object in a checkpoint.

In: a process's own position. Out: all positions gathered, and later this process's own again.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

DataState = bytes | Mapping[str, Any] | None


def pack_data_states(data_state: DataState) -> dict[str, Any]:
    """Gather every process's data position as one JSON object.

    Args:
        data_state: this process's own.

    Returns:
        The positions of all processes, in their order.

    Raises:
        TypeError: it is not JSON.
    """
    if isinstance(data_state, bytes):
        own: dict[str, Any] = {"base64": base64.b64encode(data_state).decode()}
    else:
        own = {"json": None if data_state is None else dict(data_state)}
    text = json.dumps(own).encode()
    if jax.process_count() == 1:
        return {"processes": [json.loads(text)]}
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    texts = [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
    return {"processes": [json.loads(text) for text in texts]}


def unpack_data_state(stored: Mapping[str, Any], folder: epath.Path) -> Any:
    """Extract this process's own data position from the gathered ones.

    Args:
        stored: from `pack_data_states`.
        folder: where it was read, for the error.

    Returns:
        What this process saved.

    Raises:
        ValueError: they were saved by another number of processes.
    """
    states = stored["processes"]
    if len(states) != jax.process_count():
        raise ValueError(
            f"{folder} has the data positions of {len(states)} process(es), but this run has "
            f"{jax.process_count()}: resume with the number of processes that saved it"
        )
    own = states[jax.process_index()]
    return base64.b64decode(own["base64"]) if "base64" in own else own["json"]
