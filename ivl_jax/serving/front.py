"""Between HTTP and the engine: admission, time-outs, and who has left.

In: prompts ready for the engine. Out: an iterator over what each choice gets, in the event loop.
Whoever stops iterating cancels the request, and its rows are free.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ivl_jax.config import ServeConfig
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.serving.engine_thread import ChoiceProgress, EngineThread, Ticket
from ivl_jax.serving.errors import ApiError
from ivl_jax.serving.metrics import Metrics

_T = TypeVar("_T")


class Front:
    """Takes requests, as many as the configuration allows.

    Args:
        config: limits and time-outs.
        engine: its thread.
        metrics: what requests are counted in.

    Attributes:
        in_flight: Choices that run or wait.
    """

    def __init__(self, config: ServeConfig, engine: EngineThread, metrics: Metrics) -> None:
        self.in_flight = 0
        self._config, self._engine, self._metrics = config, engine, metrics
        # Tokenizers are not safe in several threads at once; rendering may take a moment.
        self._readers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")

    async def read(self, work: Callable[[], _T]) -> _T:
        """Read prompts in a thread of its own, so that other requests need not wait.

        Args:
            work: does it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def admit(self, choices: int) -> None:
        """Refuse a request that would have to wait behind too many others.

        Args:
            choices: how many it has.

        Raises:
            ApiError: with status 429, or 503 where the engine has ended.
        """
        if self._engine.failure is not None:
            raise ApiError(
                503, f"the engine has failed: {self._engine.failure}", code="unavailable"
            )
        config = self._config
        if self.in_flight + choices > config.max_rows + config.max_waiting:
            raise ApiError(
                429,
                f"{self.in_flight} choices run or wait, and this request asks for {choices}: at "
                f"most {config.max_rows} run and {config.max_waiting} wait; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    async def choices(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        streams: bool,
        held: contextlib.AbstractContextManager[None],
    ) -> AsyncGenerator[ChoiceProgress, None]:
        """Decode the choices of a request.

        Args:
            prompts: one per choice; `admit` has let them in.
            streams: whether the client reads along.
            held: entered while the prompts are in the engine: keeps what they use loaded.

        Yields:
            What each choice gets, until all have ended.

        Raises:
            ApiError: it took too long, or decoding failed.
        """
        self.admit(len(prompts))
        with held:
            async with contextlib.aclosing(self._decode(prompts, streams=streams)) as progress:
                async for event in progress:
                    yield event

    async def _decode(
        self, prompts: Sequence[EncodedPrompt], *, streams: bool
    ) -> AsyncGenerator[ChoiceProgress, None]:
        metrics = self._metrics
        ticket, left = Ticket(prompts, streams=streams), len(prompts)
        start = time.monotonic()
        begun: dict[int, float] = {}
        self.in_flight += len(prompts)
        metrics.prompt_tokens.inc(sum(len(prompt.token_ids) for prompt in prompts))
        self._engine.submit(ticket)
        try:
            while left:
                event = await self._next(ticket, start, begun=bool(begun))
                now = time.monotonic()
                if event.choice not in begun:
                    if not begun:
                        metrics.first_token.observe(now - start)
                    begun[event.choice] = now
                generation = event.progress.generation
                if generation is not None:
                    left -= 1
                    if len(generation.token_ids) > 1 and now > begun[event.choice]:
                        seconds = now - begun[event.choice]
                        metrics.per_token.observe(seconds / (len(generation.token_ids) - 1))
                    if generation.error is not None:
                        raise ApiError(500, generation.error, code="decoding_failed")
                yield event
        finally:
            self.in_flight -= len(prompts)
            if left:
                self._engine.cancel(ticket)

    async def _next(self, ticket: Ticket, start: float, *, begun: bool) -> ChoiceProgress:
        config = self._config
        ends = start + config.request_seconds
        if not begun:
            ends = min(ends, start + config.queue_seconds)
        try:
            return await asyncio.wait_for(ticket.get(), max(0.0, ends - time.monotonic()))
        except TimeoutError:
            waited = time.monotonic() - start
            what = "has not ended" if begun else "has no token yet"
            raise ApiError(
                503,
                f"the request {what} after {waited:.1f} s (at most {config.queue_seconds:g} s for "
                f"the first token, {config.request_seconds:g} s in total): try again later, or ask "
                "for fewer tokens",
                code="timeout",
                headers={"Retry-After": "5"},
            ) from None

    def close(self) -> None:
        """End the thread that reads prompts."""
        self._readers.shutdown(wait=False, cancel_futures=True)
