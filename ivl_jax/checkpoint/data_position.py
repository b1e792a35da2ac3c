"""Each process's position in its data, as one JSON object in a checkpoint.

In: a process's own position. Out: all positions gathered, and later this process's own again.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from ivl_jax.processes import all_texts

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
    return {"processes": [json.loads(text) for text in all_texts(json.dumps(own))]}


def unpack_data_state(stored: Mapping[str, Any], folder: epath.Path) -> Any:
    """Extract this process's own data position from the gathered ones.

    Args:
        stored: from `pack_data_states`.
        folder: where it was read, for the error.

    Returns:
        What this process saved, or, for another number of processes, what all of them saved alike:
        a position in global batches, of which each process reads its share.

    Raises:
        ValueError: another number of processes saved different positions.
    """
    states = stored["processes"]
    if len(states) == jax.process_count():
        own = states[jax.process_index()]
    elif all(state == states[0] for state in states):
        own = states[0]
    else:
        raise ValueError(
            f"{folder} has different data positions of {len(states)} processes, but this run has "
            f"{jax.process_count()}: resume with the number of processes that saved it"
        )
    return base64.b64decode(own["base64"]) if "base64" in own else own["json"]
