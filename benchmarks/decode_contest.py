"""Times decoders and memory reads alternately; only decoding is timed, not reading the prompts.

In: decoders by name. Out: tokens per second of each, their output, and bytes read per second.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Figures, time_in_turn, time_work

PROMPT_TOKENS = 64
NEW_TOKENS = 128
# Larger than any cache, like a decoder's weights: 16,384² float32.
_MATRIX_SIDE = 16_384
_MEMORY_REPEATS = 5


class Contender(NamedTuple):
    """A decoder, as the contest sees it."""

    prefill: Callable[[], Any]
    """Reads the prompts and generates the first token; returns a state."""
    decode: Callable[[Any], np.ndarray]
    """Generates the other tokens; returns all of them, [B T], prompt included."""
    repeats: int
    """Timed calls."""
    warm_up: bool = True
    """Whether the first call, which may compile, is not timed."""


class Outcome(NamedTuple):
    """The contest's results for one decoder."""

    seconds: tuple[float, ...]
    """Of a token, all rows at once, in each timed call."""
    tokens: np.ndarray
    """What it generated, [B T], prompt included."""

    @property
    def rate(self) -> Figures:
        """Tokens per second, over all rows."""
        return Figures.of(len(self.tokens) / each for each in self.seconds)

    @property
    def step(self) -> Figures:
        """Milliseconds per step, with all rows at once."""
        return Figures.of(1e3 * each for each in self.seconds)


class Memory(NamedTuple):
    """Bytes per second that a float32 matrix × vector product over 1 GiB reads."""

    readings: tuple[float, ...]
    """Around each timed call of one decoder: the mean of those right before and right after it."""

    @property
    def rate(self) -> Figures:
        """Bytes per second."""
        return Figures.of(self.readings)

    def limit(self, outcome: Outcome, step_bytes: float) -> float:
        """Tokens per second that memory allows at its speed around a decoder's calls.

        The share of memory's speed is computed per call, since on a shared machine that speed
        changes by half within a minute; the limit is chosen to reproduce the median share.

        Args:
            outcome: of the decoder around whose calls memory was read.
            step_bytes: bytes that a step reads, with all rows at once.

        Returns:
            Tokens per second, over all rows.
        """
        shares = [
            step_bytes / each / reading
            for each, reading in zip(outcome.seconds, self.readings, strict=True)
        ]
        return outcome.rate.median / statistics.median(shares)


def random_prompts(batch: int, vocab_size: int) -> np.ndarray:
    """Prompts [B 64] of random tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, PROMPT_TOKENS), np.int32)


def contest(
    contenders: Mapping[str, Contender], *, new_tokens: int, memory_around: str = ""
) -> tuple[dict[str, Outcome], Memory]:
    """Run the decoders one after the other, repeatedly.

    Args:
        contenders: by name.
        new_tokens: tokens generated per row; the first comes from the prompt and is not timed.
        memory_around: the contender right before and after whose timed calls memory is read; empty:
            memory is not read.

    Returns:
        Outcomes by name; and the memory's speed, in the faster of a kernel's two orientations.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, np.ndarray] = {}
    readings: list[float] = []
    read_memory = _memory_reader() if memory_around else None
    for turn in range(-1, max(contender.repeats for contender in contenders.values())):
        for name, (prefill, decode, repeats, warm_up) in contenders.items():
            if turn >= repeats or (turn < 0 and not warm_up):
                continue
            state = jax.block_until_ready(prefill())
            reader = read_memory if turn >= 0 and name == memory_around else None
            before = reader() if reader else 0.0
            started = time.perf_counter()
            tokens[name] = decode(state)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - started) / (new_tokens - 1))
            if reader:
                readings.append((before + reader()) / 2)
    outcomes = {name: Outcome(tuple(seconds[name]), tokens[name]) for name in contenders}
    return outcomes, Memory(tuple(readings))


def _memory_reader() -> Callable[[], float]:
    """A function that measures bytes per second of a matrix × vector product (a median)."""
    kernel = jnp.ones((_MATRIX_SIDE, _MATRIX_SIDE), jnp.float32)
    row, column = jnp.ones((1, _MATRIX_SIDE)), jnp.ones((_MATRIX_SIDE, 1))
    multiply = jax.jit(jnp.dot)
    products = {
        "(in, out)": lambda: multiply(row, kernel),
        "(out, in)": lambda: multiply(kernel, column),
    }
    found = time_in_turn(products, repeats=_MEMORY_REPEATS)
    fastest = min(products, key=lambda name: found[name].figures.median)

    def read() -> float:
        timing = time_work(products[fastest], repeats=_MEMORY_REPEATS, warm_up=0)
        return timing.rate(kernel.nbytes).median

    return read
