"""Log-probabilities of what a batch generates: room on device, plain numbers for callers.

In: what the rows ask for. Out: a `DecodeState` with as much room as they need; `TokenLogProbs` of
each row's new tokens.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from ivl_jax.buckets import bucket
from ivl_jax.decoding.device.state import DecodeState, LogProbs
from ivl_jax.decoding.engine_model import EngineModel
from ivl_jax.decoding.entries import Entry
from ivl_jax.decoding.generation import TokenLogProbs
from ivl_jax.decoding.requests import bucket_top_log_probs

# New tokens whose log-probabilities are fetched at once: few widths, few programs.
_SMALLEST_FETCH = 16


def top_to_keep(model: EngineModel, entries: Iterable[Entry]) -> int | None:
    """How many likeliest tokens to keep per generated token.

    Args:
        model: what the rows are decoded with.
        entries: the requests of the rows.

    Returns:
        A bucket; None: no request asks for log-probabilities.
    """
    options = [entry.prompt.options for entry in entries]
    return bucket_top_log_probs(options, vocab_size=model.composition.base.vocab_size)


def with_room(model: EngineModel, state: DecodeState, top: int | None) -> DecodeState:
    """Allocate or drop the log-probabilities of a state; what they held has been fetched.

    Args:
        model: what the rows are decoded with.
        state: the rows.
        top: likeliest tokens to keep per generated token; None: no log-probabilities.

    Returns:
        The state, with room for them if it had none of this size.
    """
    if state.top_log_probs == top:
        return state
    make = model.programs.empty_log_probs
    return state._replace(log_probs=None if top is None else make(*state.tokens.shape, top=top))


def fetch_log_probs(
    model: EngineModel,
    state: DecodeState,
    new_ids: Mapping[int, Sequence[int]],
    lengths: np.ndarray,
    entries: Mapping[int, Entry],
) -> dict[int, list[TokenLogProbs]]:
    """Fetch the log-probabilities of new tokens.

    Args:
        model: what the rows are decoded with.
        state: the rows.
        new_ids: the new tokens of each row.
        lengths: [B] tokens of each row, the new ones included.
        entries: the request of each row.

    Returns:
        Plain numbers, by row; rows that ask for none are not in it.
    """
    asking: dict[int, int] = {}
    starts = np.zeros(len(lengths), np.int32)
    for place, entry in entries.items():
        if (top := entry.prompt.options.log_probs) is not None:
            asking[place], starts[place] = top, lengths[place] - len(new_ids[place])
    longest = max((len(new_ids[place]) for place in asking), default=0)
    if state.log_probs is None or not longest:
        return {}
    width = bucket(longest, smallest=_SMALLEST_FETCH)
    latest = jax.device_get(model.programs.latest_log_probs(state.log_probs, starts, width=width))
    return {
        place: [_of_token(latest, place, index, top=top) for index in range(len(new_ids[place]))]
        for place, top in asking.items()
    }


def _of_token(latest: LogProbs, place: int, index: int, *, top: int) -> TokenLogProbs:
    pairs = zip(latest.top_ids[place, index, :top], latest.top[place, index, :top], strict=True)
    return TokenLogProbs(
        float(latest.chosen[place, index]),
        tuple((int(token), float(p)) for token, p in pairs),
        float(latest.base[place, index]),
    )
