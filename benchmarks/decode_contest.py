"""Times decoders and the memory in turn: prompts are read first, and only decoding is timed.

In: decoders by name. Out: tokens a second of each, what they generated, and bytes read a second.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Figures

PROMPT_TOKENS = 64
NEW_TOKENS = 128
# Larger than any cache, as a decoder's weights are; 16,384² float32.
_MATRIX_SIDE = 16_384


class Contender(NamedTuple):
    """A decoder, as the contest sees it."""

    prefill: Callable[[], Any]
    """Reads the prompts and generates the first token; returns a state."""
    decode: Callable[[Any], np.ndarray]
    """Generates the other tokens; returns all of them, [B T], prompt included."""
    repeats: int
    """Timed calls."""
    warm_up: bool = True
    """Whether a first call, which may compile, is left out."""


class Outcome(NamedTuple):
    """What the contest found about one decoder."""

    rate: Figures
    """Tokens a second, all rows together."""
    step: Figures
    """Milliseconds a token, all rows at once."""
    tokens: np.ndarray
    """What it generated, [B T], prompt included."""


def random_prompts(batch: int, vocab_size: int) -> np.ndarray:
    """Prompts [B 64] of random tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, PROMPT_TOKENS), np.int32)


def contest(
    contenders: Mapping[str, Contender], *, new_tokens: int, memory_repeats: int
) -> tuple[dict[str, Outcome], Figures]:
    """Let each decoder generate, one after the other, again and again; read memory in between.

    Args:
        contenders: by name.
        new_tokens: tokens each generates a row; the first comes from the prompt and is not timed.
        memory_repeats: readings of a matrix; 0: none.

    Returns:
        By name, what was found; and bytes a second that a float32 matrix × vector product over
        1 GiB reads, the faster one of the kernel's two orientations.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, np.ndarray] = {}
    readers = _readers() if memory_repeats else {}
    read: dict[str, list[float]] = {name: [] for name in readers}
    turns = max([contender.repeats for contender in contenders.values()] + [memory_repeats])
    for turn in range(-1, turns):
        for name, (prefill, decode, repeats, warm_up) in contenders.items():
            if turn < repeats and (turn >= 0 or warm_up):
                state = jax.block_until_ready(prefill())
                started = time.perf_counter()
                tokens[name] = decode(state)
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - started)
        for name, reader in readers.items():
            if turn < memory_repeats:
                started = time.perf_counter()
                jax.block_until_ready(reader())
                if turn >= 0:
                    read[name].append(4 * _MATRIX_SIDE**2 / (time.perf_counter() - started))
    memory = max(map(Figures.of, read.values()), default=Figures(0.0, 0.0))
    steps = new_tokens - 1
    return {
        name: Outcome(
            Figures.of(len(tokens[name]) * steps / each for each in seconds[name]),
            Figures.of(1e3 * each / steps for each in seconds[name]),
            tokens[name],
        )
        for name in contenders
    }, memory


def _readers() -> dict[str, Callable[[], jax.Array]]:
    """A matrix × vector product in each orientation of the kernel."""
    kernel = jnp.ones((_MATRIX_SIDE, _MATRIX_SIDE), jnp.float32)
    row, column = jnp.ones((1, _MATRIX_SIDE)), jnp.ones((_MATRIX_SIDE, 1))
    multiply = jax.jit(jnp.dot)
    return {
        "(in, out)": lambda: multiply(row, kernel),
        "(out, in)": lambda: multiply(kernel, column),
    }
