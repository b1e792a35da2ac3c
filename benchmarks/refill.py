"""256 ragged requests: rows refilled as they end, compared with batches that wait for the longest.

Weights and prompts are random, lengths are distributed like GSM8K's. Out: rows in generated tokens
per second, prompts included in the time; among the shapes, the share of steps in which a row of a
static batch is busy, whose inverse is the most that refilling can gain.

Neither knows how long each row will be: requests come in random order and are not sorted.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.composed import composed, random_weights
from benchmarks.engine_requests import (
    ANSWERS,
    QUESTIONS,
    Work,
    describe_lengths,
    draw_lengths,
    engine_model,
    generate,
    random_requests,
)
from benchmarks.report import Options, Peer, Report, Row
from benchmarks.shapes import BASE_C, VALUE_C, parameter_count
from benchmarks.timing import time_in_turn

ABOUT = "256 ragged requests: rows refilled as they end, beside static batches"

_REFILLED, _STATIC = "refilled", "static batches of the same size"


class Plan(NamedTuple):
    """How much is decoded."""

    requests: int
    shorter: int
    """Lengths are GSM8K's divided by this."""
    batches: tuple[int, ...]
    repeats: int


def run(options: Options) -> Report:
    """Decode the same requests both ways, in turn.

    Args:
        options: quick: 48 requests at batch 8 instead of 256 at 8 and 32.

    Returns:
        The report.
    """
    plan = Plan(48, 4, (8,), 1) if options.quick else Plan(256, 4, (8, 32), 2)
    model = engine_model(composed(random_weights(BASE_C, seed=0), random_weights(VALUE_C, seed=1)))
    rng = np.random.default_rng(0)
    prompts, answers = (
        draw_lengths(rng, plan.requests, median / plan.shorter, deviation)
        for median, deviation in (QUESTIONS, ANSWERS)
    )
    ragged = random_requests(rng, BASE_C.vocab_size, prompts, answers)
    rows = []
    for batch in plan.batches:
        works = {
            _REFILLED: Work(ragged, len(ragged), batch),
            _STATIC: Work(ragged, batch, batch),
        }
        timings = time_in_turn(
            {name: partial(generate, model, work) for name, work in works.items()},
            repeats=plan.repeats,
        )
        rates = {name: timings[name].rate(work.tokens) for name, work in works.items()}
        rows.append(
            Row(
                f"batch {batch}: {plan.requests} ragged requests, rows refilled",
                rates[_REFILLED],
                "tokens/s",
                "higher",
                peer=Peer(_STATIC, rates[_STATIC].median),
            )
        )
    shapes = {
        "base": parameter_count(BASE_C),
        "value": parameter_count(VALUE_C),
        "requests": plan.requests,
        "prompts": describe_lengths(prompts),
        "new tokens": describe_lengths(answers),
        "a static row is busy": {batch: _busy(answers, batch) for batch in plan.batches},
    }
    return Report(rows, dtype="float32", shapes=shapes)


def _busy(answers: Sequence[int], batch: int) -> float:
    """Share of steps in which a row of a static batch generates requested tokens."""
    longest = [max(answers[start : start + batch]) for start in range(0, len(answers), batch)]
    return round(sum(answers) / (batch * sum(longest)), 3)
