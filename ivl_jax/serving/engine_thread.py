"""The one thread that owns the engine and its arrays; the event loop sends it orders.

In: tickets (the choices of one request) to submit or to cancel. Out: what each step has brought,
put into the ticket's own queue in the event loop. Nobody else touches the engine while it runs.

A step that fails costs the requests that the engine says are lost; they get an error, and the
thread runs on. It ends only when it is stopped, or by an error in its own code; every request that
is there or still comes then gets an error, and `failure` says why.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ivl_jax.decoding.capacity import RequestTooLargeError
from ivl_jax.decoding.engine import Engine, Progress
from ivl_jax.decoding.requests import EncodedPrompt
from ivl_jax.serving.errors import NO_RETRY, ApiError, invalid
from ivl_jax.serving.metrics import Metrics

logger = logging.getLogger(__name__)

# Tokens between two looks of the host: a client that reads along sees a piece every few tokens.
_TOKENS_A_PIECE = 4
_TOKENS_A_LOOK = 16


class ChoiceProgress(NamedTuple):
    """What one choice of a request has got."""

    choice: int
    progress: Progress


class Ticket:
    """The choices of one request; made and read in the event loop.

    Args:
        prompts: one per choice.
        streams: whether the client reads along.
        on_end: is told how many choices have ended, when that arrives, read or not.
    """

    def __init__(
        self, prompts: Sequence[EncodedPrompt], *, streams: bool, on_end: Callable[[int], None]
    ) -> None:
        self.prompts, self.streams = tuple(prompts), streams
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[ChoiceProgress | ApiError] = asyncio.Queue()
        self._left = len(self.prompts)  # choices whose end has not arrived

    @property
    def has_ended(self) -> bool:
        """Whether its last event has arrived, so that `get` need not wait for any."""
        return not self._left

    async def get(self) -> ChoiceProgress:
        """Wait for the next event.

        Raises:
            ApiError: the request failed.
        """
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def put(self, events: Sequence[ChoiceProgress | ApiError]) -> None:
        """Deliver events; called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, events)
        except RuntimeError:  # the event loop has ended, and every client with it
            logger.debug("nobody is left to read %d events", len(events))

    def _put(self, events: Sequence[ChoiceProgress | ApiError]) -> None:
        for event in events:
            self._events.put_nowait(event)
            if isinstance(event, ApiError):
                ended = self._left
            else:
                ended = int(event.progress.generation is not None)
            self._left -= ended
            self._on_end(ended)


def _too_large(ticket: Ticket) -> ApiError:
    """The answer to a request that the engine's caches can never hold."""
    longest = max(
        len(prompt.token_ids) + prompt.options.max_new_tokens for prompt in ticket.prompts
    )
    return invalid(
        f"the prompt and its answer may hold {longest} tokens, more than the caches of this server "
        "can: shorten the prompt, ask for a smaller max_tokens, or start the server with a larger "
        "--max-cache-mib or --max-request-tokens",
        "max_tokens",
        code="cache_memory_exceeded",
    )


class EngineThread:
    """Runs an engine.

    Args:
        engine: used by the thread alone, once it runs.
        metrics: what it is counted in.

    Attributes:
        failure: Why the thread ended by itself; None while it runs.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.failure: str | None = None
        self._metrics = metrics
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._engine = engine
        # Requests of the engine, by its id: whose choice each of them is.
        self._owners: dict[int, tuple[Ticket, int]] = {}
        # Why the thread carries out no more orders; the lock orders it with the queue.
        self._ended: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def load(self) -> int:
        """Choices that run or wait in the engine, as far as orders have been carried out."""
        return self._engine.running + self._engine.waiting

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, *, seconds: float) -> None:
        """End the thread after the step that it is in; what still runs gets an error.

        Args:
            seconds: how long to wait for it, at most: a step that compiles may take minutes.
        """
        self._orders.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning("the engine is still in a step after %g s: it is left alone", seconds)

    def submit(self, ticket: Ticket) -> None:
        """Queue the choices of a request."""
        self._order(lambda: self._submit(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its rows are free before the next step."""
        self._order(lambda: self._cancel(ticket))

    async def change(self, work: Callable[[Engine], None]) -> None:
        """Change the engine between two steps, after what has been ordered so far.

        Args:
            work: is given the engine, in its thread; short, since running rows wait for it.

        Raises:
            ApiError: the engine has ended (503).
            Exception: what the work raises; the thread runs on.
        """
        done = asyncio.get_running_loop().create_future()

        def order() -> None:
            if self._ended is not None:
                _settle(done, ApiError(503, self._ended))
                return
            try:
                work(self._engine)
            except Exception as error:
                _settle(done, error)
            else:
                _settle(done, None)

        self._order(order)
        await done

    def _order(self, order: Callable[[], None]) -> None:
        """Have the thread carry out an order; once it has ended, all that orders do is refuse."""
        with self._lock:
            if self._ended is None:
                self._orders.put(order)
                return
        order()

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._step()
            self._fail_all("the server is stopping")
        except BaseException as error:
            logger.exception("the engine's thread has ended")
            self.failure = f"{type(error).__name__}: {error}"
            self._fail_all(f"the engine has failed: {self.failure}")

    def _take_orders(self) -> bool:
        """Carry out what has been ordered; wait for an order where there is nothing to decode."""
        try:
            while True:
                order = self._orders.get(block=self._engine.idle)
                if order is None:
                    return False
                order()
        except queue.Empty:
            return True

    def _submit(self, ticket: Ticket) -> None:
        if self._ended is not None:
            ticket.put([ApiError(503, self._ended)])
            return
        submitted = []
        try:
            for choice, prompt in enumerate(ticket.prompts):
                request = self._engine.submit(prompt)
                submitted.append(request)
                self._owners[request] = (ticket, choice)
        except Exception as error:
            for request in submitted:
                self._engine.cancel(request)
                del self._owners[request]
            if not isinstance(error, RequestTooLargeError):
                logger.exception("a request could not be submitted")
                failed = f"the request could not be submitted: {error}"
                ticket.put([ApiError(500, failed, headers=NO_RETRY)])
                return
            ticket.put([_too_large(ticket)])
        self._show_load()

    def _cancel(self, ticket: Ticket) -> None:
        for request, (owner, _) in list(self._owners.items()):
            if owner is ticket:
                self._engine.cancel(request)
                del self._owners[request]
        self._show_load()

    def _step(self) -> None:
        engine = self._engine
        if engine.idle:
            return
        someone_reads = any(ticket.streams for ticket, _ in self._owners.values())
        try:
            progress = engine.step(max_tokens=_TOKENS_A_PIECE if someone_reads else _TOKENS_A_LOOK)
        except Exception as error:
            self._lose(engine.lost, error)
            return
        events: dict[Ticket, list[ChoiceProgress | ApiError]] = {}
        for one in progress:
            ticket, choice = self._owners[one.id]
            events.setdefault(ticket, []).append(ChoiceProgress(choice, one))
            self._metrics.generated_tokens.inc(len(one.token_ids))
            if one.generation is not None:
                del self._owners[one.id]
        for ticket, news in events.items():
            ticket.put(news)
        self._show_load()
        if engine.shape is not None:
            self._metrics.occupancy.observe(engine.running / engine.shape.rows)

    def _lose(self, lost: Sequence[int], error: Exception) -> None:
        """Tell the owners of requests that a step has lost, and forget their other choices."""
        logger.error("a step of the engine failed and lost %d choices", len(lost), exc_info=error)
        self._metrics.failed_steps.inc()
        message = f"decoding failed and this request was lost ({type(error).__name__}): try again"
        for ticket in {self._owners[request][0] for request in lost if request in self._owners}:
            ticket.put([ApiError(500, message, code="decoding_failed")])
            self._cancel(ticket)

    def _fail_all(self, message: str) -> None:
        """Refuse what runs, what has been ordered, and what will be."""
        with self._lock:
            self._ended = message
        for ticket in {owner for owner, _ in self._owners.values()}:
            ticket.put([ApiError(503, message)])
        self._owners.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                if order := self._orders.get_nowait():
                    order()

    def _show_load(self) -> None:
        engine, metrics = self._engine, self._metrics
        metrics.waiting.set(engine.waiting)
        metrics.running.set(engine.running)
        metrics.rows.set(0 if engine.shape is None else engine.shape.rows)


def _settle(done: "asyncio.Future[None]", error: Exception | None) -> None:
    """End a future from any thread, unless it has ended."""

    def settle() -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    try:
        done.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the event loop has ended, and whoever waited with it
        logger.debug("nobody is left to hear of a change of the engine")
