"""Teacher forcing across vocabularies: a value network reads every re-tokenised prefix of a text.

In: texts in the base's tokens. Out: for each base position, the value network's final hidden state
after the text up to that position, in its own tokens, as in decoding.

Most prefixes tokenise to a prefix of the whole text's tokens, so one pass covers them. The few
that end differently ("unbeliev" before "able" follows) need only a short tail each, read after the
cached beginning that they share: two passes, however long the text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ivl_jax.buckets import bucket
from ivl_jax.composed.network import Network
from ivl_jax.composition import SchemeInputs, value_hidden
from ivl_jax.model.decoder import Params
from ivl_jax.model.kv_cache import KVCache, init_cache
from ivl_jax.sharding import batch_ways
from ivl_jax.vocabulary.retokenize import RetokenizedText

_SMALLEST_LENGTH, _SMALLEST_TAIL, _SMALLEST_TAILS = 16, 4, 16
# Each tail has a copy of its row's cache; at most this many bytes of copies exist at once.
_CACHE_BYTES = 1 << 27


class OwnPrefixes(NamedTuple):
    """What a value network reads to cover every prefix of the texts in a batch."""

    tokens: Int[Array | np.ndarray, "B U"]
    """The whole texts in its own tokens, right-padded."""
    tails: Int[Array | np.ndarray, "N K"]
    """Ends of the prefixes whose tokens are not a prefix of the whole text's, right-padded."""
    tail_rows: Int[Array | np.ndarray, " N"]
    """The row of the text that each tail belongs to."""
    tail_starts: Int[Array | np.ndarray, " N"]
    """Position of its first token; before it, the prefix has the whole text's tokens."""
    places: Int[Array | np.ndarray, "B T"]
    """For each base position, where its prefix's last token is: an index into the B × U tokens of
    the whole texts, followed by the N × K tokens of the tails."""


def plan_prefixes(
    beginnings: Sequence[RetokenizedText],
    following: Sequence[Sequence[int]],
    *,
    starts: Sequence[int],
    batch: int,
    length: int,
) -> OwnPrefixes:
    """Find what a value network has to read.

    Args:
        beginnings: for each row, its text up to the first position wanted; not modified.
        following: for each row, the base tokens that follow, one per position.
        starts: for each row, the base position at which its beginning ends.
        batch: rows on the device; those beyond the real rows only fill the batch.
        length: base positions per row, T.

    Returns:
        NumPy arrays of bucketed shapes. Positions before a row's start point at its first token.
    """
    whole: list[list[int]] = []
    tails: list[tuple[int, int, list[int]]] = []
    # For each wanted position: its tail, or −1; and the index of its prefix's last token there.
    found: list[list[tuple[int, int]]] = []
    for row, (beginning, ids) in enumerate(zip(beginnings, following, strict=True)):
        text, steps = beginning.fork(), []
        for base_id in ids:
            before = list(text.tokens)
            same = text.push([base_id])
            steps.append((same, before[same:]))
        whole.append(list(text.tokens))
        found.append(_trace_back(text.tokens, steps, row=row, tails=tails))
    width = bucket(max(map(len, whole)), smallest=_SMALLEST_LENGTH)
    tail_width = bucket(max((len(tail) for *_, tail in tails), default=1), smallest=_SMALLEST_TAIL)
    tail_count = bucket(len(tails), smallest=_SMALLEST_TAILS) if tails else 0
    prefixes = OwnPrefixes(
        tokens=np.zeros((batch, width), np.int32),
        tails=np.zeros((tail_count, tail_width), np.int32),
        tail_rows=np.zeros(tail_count, np.int32),
        tail_starts=np.zeros(tail_count, np.int32),
        places=np.zeros((batch, length), np.int32),
    )
    for index, (row, start, tail) in enumerate(tails):
        prefixes.tails[index, : len(tail)] = tail
        prefixes.tail_rows[index], prefixes.tail_starts[index] = row, start
    for row, tokens in enumerate(whole):
        prefixes.tokens[row, : len(tokens)] = tokens
        prefixes.places[row] = row * width
        for position, (tail, place) in enumerate(found[row], starts[row]):
            at = row * width if tail < 0 else batch * width + tail * tail_width
            prefixes.places[row, position] = at + place
    return prefixes


def run_prefixes(network: Network, params: Params, prefixes: OwnPrefixes) -> Float[Array, "B T D"]:
    """Run a value network over every prefix.

    Args:
        network: its static half; it reads text only.
        params: its parameters.
        prefixes: from `plan_prefixes`.

    Returns:
        Its final hidden state after the prefix that ends at each base position.
    """
    batch, width = prefixes.tokens.shape
    tails, tail_width = prefixes.tails.shape
    # A tail may end beyond the whole text, which is shorter where tokens have merged.
    capacity = width + tail_width
    dtype = jnp.dtype(network.cache_dtype)
    empty = init_cache(network.arch, batch_size=batch, capacity=capacity, dtype=dtype)
    starts = jnp.zeros(batch, jnp.int32)
    tokens = jnp.asarray(prefixes.tokens)
    whole, cache = _read(network, params, tokens, starts, empty, prompt_lengths=starts + width)
    flat = whole.reshape(-1, whole.shape[-1])
    if tails:
        at_once = _tails_at_once(network, tails, capacity)
        parts = jax.tree.map(
            lambda array: jnp.pad(
                array, ((0, -tails % at_once), *[(0, 0)] * (array.ndim - 1))
            ).reshape(-1, at_once, *array.shape[1:]),
            (prefixes.tails, prefixes.tail_rows, prefixes.tail_starts),
        )

        def one_part(part: tuple[Array, Array, Array]) -> Array:
            tokens, rows, starts = part
            own = jax.tree.map(lambda array: jnp.take(array, rows, axis=0), cache)
            return _read(network, params, tokens, starts, own)[0]

        ends = jax.lax.map(one_part, parts).reshape(-1, whole.shape[-1])
        flat = jnp.concatenate([flat, ends])
    return jnp.take(flat, prefixes.places, axis=0)


def _read(
    network: Network,
    params: Params,
    tokens: Int[Array, "B U"],
    starts: Int[Array, " B"],
    cache: KVCache,
    *,
    prompt_lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B U D"], KVCache]:
    """Run the network over each row's tokens, from that row's own position on."""
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    hidden, cache_after = value_hidden(
        network.connection,
        network.graphdef,
        params,
        SchemeInputs(tokens),
        positions=starts[:, None] + steps,
        cache=cache,
        prompt_lengths=prompt_lengths,
        constrain=network.constrain,
    )
    assert cache_after is not None
    return hidden, cache_after


def _tails_at_once(network: Network, tails: int, capacity: int) -> int:
    """How many copies of a row's cache may exist at once."""
    arch = network.arch
    row = 2 * arch.num_hidden_layers * arch.num_key_value_heads * capacity * arch.head_dim
    size = row * jnp.dtype(network.cache_dtype).itemsize
    ways = 1 if network.layout is None else batch_ways(network.layout.mesh)
    wanted = min(tails, max(1, _CACHE_BYTES // size))
    return -(-wanted // ways) * ways


def _trace_back(
    whole: Sequence[int],
    steps: Sequence[tuple[int, list[int]]],
    *,
    row: int,
    tails: list[tuple[int, int, list[int]]],
) -> list[tuple[int, int]]:
    """Place every prefix of one row, from the last to the first, and add the tails it needs.

    Each step is how many tokens it kept, and which tokens after them it removed.
    """
    shared, end = len(whole), list[int]()
    found = [_place(shared, end, row=row, tails=tails)]
    for same, taken in reversed(steps):
        if same > shared:
            end = end[: same - shared] + taken
        else:
            again = _common_length(whole[same : same + len(taken)], taken)
            shared, end = same + again, taken[again:]
        found.append(_place(shared, end, row=row, tails=tails))
    return found[::-1]


def _place(
    shared: int, end: list[int], *, row: int, tails: list[tuple[int, int, list[int]]]
) -> tuple[int, int]:
    """The tail (−1: the whole text) that holds a prefix's last token, and its index there."""
    if not end:
        return -1, shared - 1
    if tails and tails[-1][:2] == (row, shared):
        newest = tails[-1][2]
        length = _common_length(newest, end)
        if length == min(len(newest), len(end)):
            newest += end[length:]
            return len(tails) - 1, len(end) - 1
    tails.append((row, shared, list(end)))
    return len(tails) - 1, len(end) - 1


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
