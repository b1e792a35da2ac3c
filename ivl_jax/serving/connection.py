"""One HTTP exchange: its body within limits, its answer as events, and a client that leaves.

In: an ASGI request. Out: parsed JSON, or a stream of server-sent events. Work for a client that has
left is cancelled.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from ivl_jax.json_files import parse_json
from ivl_jax.serving.errors import ApiError, invalid, stopping
from ivl_jax.text_files import MalformedFileError

_T = TypeVar("_T")
# A body arrives in milliseconds; one that takes longer than this holds a connection open.
_BODY_SECONDS = 30.0
# For the last event of a stream that the server cancels: its client may not read.
_GOODBYE_SECONDS = 1.0


async def read_json_body(request: Request, *, most_bytes: int) -> Any:
    """Read the body of a request.

    Args:
        request: the request.
        most_bytes: its size, at most.

    Raises:
        ApiError: it is too large or too slow, or is not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites cannot send this type without being asked for it first.
        raise ApiError(415, f"expected the content type application/json, got {kind!r:.100}")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > most_bytes:
                    raise ApiError(
                        413, f"the body has more than {most_bytes:,} bytes: send a shorter request"
                    )
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {_BODY_SECONDS:g} s") from None
    try:
        return parse_json(b"".join(pieces), "the body")
    except MalformedFileError as error:
        raise invalid(str(error)) from error


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Do some work for a client, or cancel it when the client leaves.

    Args:
        request: whose body has been read.
        work: what is done.

    Returns:
        What the work returns.

    Raises:
        ClientDisconnect: the client has left.
    """
    return await _race(request.receive, work)


async def _race(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return await doing
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An answer that is sent as server-sent events while it is being made.

    Args:
        events: JSON objects; what it raises is sent as the last event.
        source: what the events are made of; closed in any case.
        held: what they use until then; left in any case.
        longest: seconds that sending may take; a client that does not read holds no row for longer.
    """

    def __init__(
        self,
        events: AsyncGenerator[Mapping[str, Any], None],
        *,
        source: AsyncGenerator[Any, None],
        held: contextlib.AbstractContextManager[Any],
        longest: float,
    ) -> None:
        self._events, self._source, self._held, self._longest = events, source, held, longest
        self._is_open = False  # whether the client waits for more of it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        del scope
        try:
            with self._held, contextlib.suppress(ClientDisconnect, TimeoutError):
                # A client may leave before the first event is asked for.
                async with contextlib.aclosing(self._source), asyncio.timeout(self._longest):
                    await _race(receive, self._send(send))
        except asyncio.CancelledError:
            if not self._is_open:
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await _send_data(send, _dump(stopping().body()))
                    await self._close(send)

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._is_open = True
        async with contextlib.aclosing(self._events) as events:
            try:
                async for event in events:
                    await _send_data(send, _dump(event))
                await _send_data(send, "[DONE]")
            except ApiError as error:
                await _send_data(send, _dump(error.body()))
        await self._close(send)

    async def _close(self, send: Send) -> None:
        self._is_open = False
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_data(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
