"""Sampled answers to train on: the engine compared with `generate` of transformers.

Weights and prompts are random and the same for both; both sample at temperature 1, keep caches of
both networks and compute in float32. Out: rows in generated tokens per second, prompts included in
the time, for answers of equal and of ragged lengths; and which share of a GRPO step they take.
"""

from collections.abc import Sequence
from functools import partial

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
from benchmarks.report import Options, Peer, Report, Row, Target
from benchmarks.shapes import BASE_C, VALUE_C, parameter_count
from benchmarks.timing import Figures, time_in_turn
from benchmarks.training_steps import OurStep, Sizes
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.training.objectives.grpo import GRPO

ABOUT = "sampled answers beside `generate` of transformers, and their share of a GRPO step"

_BATCH = 32
_PROMPT, _ANSWER = 64, 64
_OURS, _PEER = "ivl_jax", "transformers generate, float32"
_TARGETS = {"equal": 1.5, "ragged": 2.5}


def run(options: Options) -> Report:
    """Sample with both in turn, then time the step that trains on the answers.

    Args:
        options: quick: 48 ragged requests instead of 96, a quarter of the lengths, one repeat.

    Returns:
        The report.
    """
    import torch

    from benchmarks.generate_peer import write_answers
    from benchmarks.torch_peers import llama

    shorter, count, repeats = (4, 48, 1) if options.quick else (1, 96, 3)
    weights = random_weights(BASE_C, seed=0), random_weights(VALUE_C, seed=1)
    engine = engine_model(composed(*weights))
    base, value = (llama(*each, dtype=torch.float32) for each in weights)

    def peer(requests: Sequence[EncodedPrompt]) -> None:
        for start in range(0, len(requests), _BATCH):
            some = requests[start : start + _BATCH]
            lengths = [one.options.max_new_tokens for one in some]
            prompts = [one.token_ids for one in some]
            write_answers(base, value, prompts, lengths, greedy=False)

    rng = np.random.default_rng(0)
    drawn = [draw_lengths(rng, count, of[0] / shorter, of[1]) for of in (QUESTIONS, ANSWERS)]
    lengths = {
        "equal": ([_PROMPT // shorter] * _BATCH, [_ANSWER // shorter] * _BATCH),
        "ragged": (drawn[0], drawn[1]),
    }
    rows, seconds = [], 0.0
    for kind, (prompts, answers) in lengths.items():
        requests = random_requests(rng, BASE_C.vocab_size, prompts, answers, temperature=1.0)
        work = Work(requests, len(requests), _BATCH)
        contenders = {_OURS: partial(generate, engine, work), _PEER: partial(peer, requests)}
        timings = time_in_turn(contenders, repeats=repeats)
        rates = {name: timing.rate(work.tokens) for name, timing in timings.items()}
        if kind == "equal":
            seconds = timings[_OURS].figures.median
        rows.append(
            Row(
                f"{kind} lengths, {_BATCH} rows at once",
                rates[_OURS],
                "tokens/s",
                "higher",
                peer=Peer(_PEER, rates[_PEER].median),
                target=Target("ratio", _TARGETS[kind]),
            )
        )
    step = OurStep(BASE_C, VALUE_C, Sizes(_BATCH, (_PROMPT + _ANSWER) // shorter), objective=GRPO)
    update = time_in_turn({"update": step}, repeats=repeats)["update"].figures.median
    share = 100 * seconds / (seconds + update)
    rows.append(Row("share of a GRPO step, equal lengths", Figures.of([share]), "%"))
    rows.append(Row("the other part, one update", Figures.of([1e3 * update]), "ms"))
    shapes = {
        "base": parameter_count(BASE_C),
        "value": parameter_count(VALUE_C),
        "equal": f"{_PROMPT // shorter} + {_ANSWER // shorter} tokens",
        "ragged requests": count,
        "ragged prompts": describe_lengths(drawn[0]),
        "ragged answers": describe_lengths(drawn[1]),
    }
    return Report(rows, dtype="float32", shapes=shapes)
