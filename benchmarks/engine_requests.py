"""Ragged requests with random tokens, and the engine that answers them.

In: shapes and lengths. Out: requests whose lengths are distributed like GSM8K's, and a function
that generates all of them without decoding to text, so that only generation is timed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.composed import Composed
from ivl_jax.decoding.capacity import EngineLimits
from ivl_jax.decoding.engine import Engine
from ivl_jax.decoding.engine_model import EngineModel
from ivl_jax.decoding.programs import build_programs
from ivl_jax.decoding.requests import EncodedPrompt, GenerationOptions
from ivl_jax.decoding.streaming import Detokenizer, RowText

# GSM8K's test questions and answers in Llama-2 tokens: median, and deviation of the logarithm.
QUESTIONS, ANSWERS = (64, 0.35), (123, 0.42)


class Work(NamedTuple):
    """Requests, and how many are given to the decoder at once."""

    requests: Sequence[EncodedPrompt]
    at_once: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens to generate."""
        return sum(request.options.max_new_tokens for request in self.requests)


def draw_lengths(
    rng: np.random.Generator, count: int, median: float, deviation: float
) -> list[int]:
    """Lengths in tokens, one per request, at least 1."""
    drawn = median * np.exp(deviation * rng.standard_normal(count))
    return np.maximum(drawn.round().astype(int), 1).tolist()


def random_requests(
    rng: np.random.Generator,
    vocabulary: int,
    prompts: Sequence[int],
    answers: Sequence[int],
    *,
    temperature: float = 0.0,
) -> list[EncodedPrompt]:
    """Requests of random tokens.

    Args:
        rng: draws the tokens.
        vocabulary: size of the vocabulary.
        prompts: tokens of each prompt.
        answers: tokens of each answer.
        temperature: of sampling; 0 is greedy.
    """
    return [
        EncodedPrompt(
            rng.integers(vocabulary, size=length).tolist(),
            GenerationOptions(max_new_tokens=int(answer), temperature=temperature),
            row,
        )
        for row, (length, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def engine_model(model: Composed) -> EngineModel:
    """What the engine needs of a composed model that never stops by itself."""
    return EngineModel(
        model.composition,
        model.params,
        build_programs(model.composition),
        names=("the base", *("a value network" for _ in model.composition.values)),
        own_vocabularies=(),
        context=model.composition.base.arch.max_position_embeddings,
        stop_ids=(),
        strengths=model.strengths,
    )


def generate(model: EngineModel, work: Work) -> None:
    """Generate everything, without decoding to text.

    Raises:
        RuntimeError: another number of tokens was generated than requested.
    """
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


def describe_lengths(lengths: Sequence[int]) -> str:
    """Their range and mean."""
    mean = round(sum(lengths) / len(lengths))
    return f"{min(lengths)} to {max(lengths)} tokens, {mean} on average"
