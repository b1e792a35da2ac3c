"""Between HTTP and the engine: admission, time-outs, and who has left.

In: prompts ready for the engine. Out: an iterator over what each choice gets, in the event loop.
Whoever stops iterating cancels the request, and its rows are free.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ivl_jax.config import ServeConfig
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.serving.engine_thread import ChoiceProgress, EngineThread, Ticket
from ivl_jax.serving.errors import NO_RETRY, ApiError
from ivl_jax.serving.metrics import Metrics

_T = TypeVar("_T")


class Places:
    """The choices of one request that are in flight; left as a context, it gives up all of them.

    Args:
        front: counts them.
        choices: how many there are.

    Attributes:
        start: When the request was admitted (monotonic seconds).
    """

    def __init__(self, front: "Front", choices: int) -> None:
        self.start = time.monotonic()
        self._front, self._left = front, choices
        front.in_flight += choices

    def end(self, choices: int) -> None:
        """Give up some, which have ended; no more than there are."""
        choices = min(choices, self._left)
        self._left -= choices
        self._front.in_flight -= choices

    def __enter__(self) -> "Places":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(self._left)


class Front:
    """Takes requests, as many as the configuration allows.

    Args:
        config: limits and time-outs.
        engine: its thread.
        metrics: what requests are counted in.

    Attributes:
        in_flight: Choices that are being encoded, run or wait.
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

    async def encode(self, work: Callable[[], _T], places: Places) -> _T:
        """Read the prompts of a request, which counts as waiting for its first token.

        Args:
            work: does it.
            places: of `admit`.

        Raises:
            ApiError: it took too long.
        """
        return await self._in_time(self.read(work), places, begun=False)

    def admit(self, choices: int) -> Places:
        """Let a request in, unless it would have to wait behind too many others.

        Args:
            choices: how many it has.

        Returns:
            Its places: from now on they count.

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
        return Places(self, choices)

    async def choices(
        self, prompts: Sequence[EncodedPrompt], *, streams: bool, places: Places
    ) -> AsyncGenerator[ChoiceProgress, None]:
        """Decode the choices of a request.

        Args:
            prompts: one per choice.
            streams: whether the client reads along.
            places: of `admit`, one per choice; each is given up when its choice has ended.

        Yields:
            What each choice gets, until all have ended.

        Raises:
            ApiError: it took too long, or decoding failed.
        """
        metrics = self._metrics
        ticket, left = Ticket(prompts, streams=streams, on_end=places.end), len(prompts)
        begun: dict[int, float] = {}
        metrics.prompt_tokens.inc(sum(len(prompt.token_ids) for prompt in prompts))
        self._engine.submit(ticket)
        try:
            while left:
                arrival = ticket.get()
                if not ticket.has_ended:  # what has ended in time may be read late
                    arrival = self._in_time(arrival, places, begun=bool(begun))
                event = await arrival
                now = time.monotonic()
                if event.choice not in begun:
                    if not begun:
                        metrics.first_token.observe(now - places.start)
                    begun[event.choice] = now
                generation = event.progress.generation
                if generation is not None:
                    left -= 1
                    if len(generation.token_ids) > 1 and now > begun[event.choice]:
                        seconds = now - begun[event.choice]
                        metrics.per_token.observe(seconds / (len(generation.token_ids) - 1))
                    if generation.error is not None:
                        raise ApiError(
                            500, generation.error, code="decoding_failed", headers=NO_RETRY
                        )
                yield event
        finally:
            if left:
                self._engine.cancel(ticket)

    async def _in_time(self, work: Awaitable[_T], places: Places, *, begun: bool) -> _T:
        """Wait for a part of a request, no longer than the request may take."""
        config = self._config
        ends = places.start + config.request_seconds
        if not begun:
            ends = min(ends, places.start + config.queue_seconds)
        try:
            return await asyncio.wait_for(work, max(0.0, ends - time.monotonic()))
        except TimeoutError:
            waited = time.monotonic() - places.start
            what = "has not ended" if begun else "has no token yet"
            raise ApiError(
                503,
                f"the request {what} after {waited:.1f} s (at most {config.queue_seconds:g} s for "
                f"the first token, {config.request_seconds:g} s in total): try again later, or ask "
                "for fewer tokens",
                code="timeout",
                # An answer that is too long now will be too long again.
                headers=NO_RETRY if begun else {"Retry-After": "5"},
            ) from None

    def close(self) -> None:
        """End the thread that reads prompts."""
        self._readers.shutdown(wait=False, cancel_futures=True)
