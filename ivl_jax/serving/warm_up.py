"""Compiles the programs of the first requests before the server listens to any.

In: an engine that nobody uses yet, and the models of the server. Out: the programs of short prompts
under each model, alone and in a full batch, are compiled or read from the compilation cache.

Programs are compiled per size, so others come later: longer prompts, other numbers of rows, other
sets of value networks, log-probabilities, logit bias.
"""

import logging
import time
from collections.abc import Sequence

from ivl_jax.config import GenerationOptions
from ivl_jax.decoding.engine import Engine
from ivl_jax.serving.catalogue import Catalogue

logger = logging.getLogger(__name__)

_PROMPT = "Hello"
_TOKENS_A_STEP = 4


def warm_up(engine: Engine, catalogue: Catalogue, *, rows: int, new_tokens: int) -> None:
    """Decode a few tokens under the base and under each value network, then forget them.

    Args:
        engine: an idle engine.
        catalogue: its models.
        rows: requests of a full batch.
        new_tokens: tokens that a request asks for where it does not say.
    """
    start, names = time.perf_counter(), (catalogue.base, *catalogue.values)
    options = GenerationOptions(max_new_tokens=new_tokens)
    for name in names:
        chosen = catalogue.choose(name, {})
        first, *others = catalogue.encode(chosen, [_PROMPT], options, choices=rows, field="prompt")
        running = [engine.submit(first)]
        _decode(engine, running)
        # The batch grows, and reads prompts while a row runs.
        running += [engine.submit(prompt) for prompt in others]
        _decode(engine, running)
        for request in running:
            engine.cancel(request)
    seconds = time.perf_counter() - start
    logger.info("warmed up %d models in %.1f s (--no-warm-up: not)", len(names), seconds)


def _decode(engine: Engine, requests: Sequence[int]) -> None:
    """Step until each request has got tokens twice, or has ended."""
    news = dict.fromkeys(requests, 0)
    while not engine.idle and min(news.values()) < 2:
        for progress in engine.step(max_tokens=_TOKENS_A_STEP):
            news[progress.id] = 2 if progress.generation else news[progress.id] + 1
