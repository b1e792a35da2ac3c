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

from benchmarks.composed import Composed, composed, random_weights
from benchmarks.report import Options, Peer, Report, Row
from benchmarks.shapes import BASE_C, VALUE_C, parameter_count
from benchmarks.timing import time_in_turn
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.engine import Engine
from ivl_jax.decoding.engine_model import EngineModel
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.requests import EncodedPrompt, GenerationOptions
from ivl_jax.decoding.streaming import Detokenizer, RowText

ABOUT = "256 ragged requests: rows refilled as they end, beside static batches"

# GSM8K's test questions and answers in Llama-2 tokens: median, and deviation of the logarithm.
_QUESTIONS, _ANSWERS = (64, 0.35), (123, 0.42)
_REFILLED, _STATIC = "refilled", "static batches of the same size"


class Plan(NamedTuple):
    """How much is decoded."""

    requests: int
    shorter: int
    """Lengths are GSM8K's divided by this."""
    batches: tuple[int, ...]
    repeats: int


class Work(NamedTuple):
    """Requests, and how many are given to the decoder at once."""

    requests: Sequence[EncodedPrompt]
    at_once: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens to generate."""
        return sum(request.options.max_new_tokens for request in self.requests)


def run(options: Options) -> Report:
    """Decode the same requests both ways, in turn.

    Args:
        options: quick: 48 requests at batch 8 instead of 256 at 8 and 32.

    Returns:
        The report.
    """
    plan = Plan(48, 4, (8,), 1) if options.quick else Plan(256, 4, (8, 32), 2)
    model = _engine_model(composed(random_weights(BASE_C, seed=0), random_weights(VALUE_C, seed=1)))
    rng = np.random.default_rng(0)
    prompts, answers = (_draw(rng, plan, *lengths) for lengths in (_QUESTIONS, _ANSWERS))
    ragged = _requests(rng, prompts, answers)
    rows = []
    for batch in plan.batches:
        works = {
            _REFILLED: Work(ragged, len(ragged), batch),
            _STATIC: Work(ragged, batch, batch),
        }
        timings = time_in_turn(
            {name: partial(_decode, model, work) for name, work in works.items()},
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
        "prompts": _described(prompts),
        "new tokens": _described(answers),
        "a static row is busy": {batch: _busy(answers, batch) for batch in plan.batches},
    }
    return Report(rows, dtype="float32", shapes=shapes)


def _draw(rng: np.random.Generator, plan: Plan, median: float, deviation: float) -> list[int]:
    """One length in tokens per request."""
    drawn = median / plan.shorter * np.exp(deviation * rng.standard_normal(plan.requests))
    return np.maximum(drawn.round().astype(int), 1).tolist()


def _requests(
    rng: np.random.Generator, prompts: Sequence[int], answers: Sequence[int]
) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(
            rng.integers(BASE_C.vocab_size, size=length).tolist(),
            GenerationOptions(max_new_tokens=int(answer)),
            row,
        )
        for row, (length, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def _engine_model(model: Composed) -> EngineModel:
    return EngineModel(
        model.composition,
        model.params,
        build_programs(model.composition),
        names=("the base", *("a value network" for _ in model.composition.values)),
        own_vocabularies=(),
        context=BASE_C.max_position_embeddings,
        stop_ids=(),
        strengths=model.strengths,
    )


def _decode(model: EngineModel, work: Work) -> None:
    """Generate everything, without decoding to text, so that only generation is timed."""
    generated = 0
    for start in range(0, len(work.requests), work.at_once):
        requests = work.requests[start : start + work.at_once]
        rows = min(work.batch, len(requests))
        engine = Engine(
            model,
            new_text=lambda _: RowText(Detokenizer((), strip_leading_space=False), ()),
            limits=EngineLimits(max_rows=rows, least_rows=rows),
        )
        for request in requests:
            engine.submit(request)
        while not engine.idle:
            generated += sum(len(one.token_ids) for one in engine.step())
    if generated != work.tokens:
        raise RuntimeError(f"{generated} tokens were generated, {work.tokens} were requested")


def _busy(answers: Sequence[int], batch: int) -> float:
    """Share of steps in which a row of a static batch generates requested tokens."""
    longest = [max(answers[start : start + batch]) for start in range(0, len(answers), batch)]
    return round(sum(answers) / (batch * sum(longest)), 3)


def _mean(lengths: Sequence[int]) -> int:
    return round(sum(lengths) / len(lengths))


def _described(lengths: Sequence[int]) -> str:
    return f"{min(lengths)} to {max(lengths)} tokens, {_mean(lengths)} on average"
