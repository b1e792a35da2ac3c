"""HTTP/1.1 whose connections make progress: one that does not is closed.

In: bytes of a connection. Out: requests for the application. Uvicorn bounds the size of a request's
head and how long a connection may idle after an answer; here are the time for the head of each
request, the time for its body, also where it is answered before the body has arrived, and the time
in which a client must take something of what waits to be sent to it.
"""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
"""How long the head of a request may take."""
BODY_SECONDS = 40.0
"""How long its body may take; longer than the application waits, whose answer comes first."""
UNREAD_SECONDS = 120.0
"""How long a client may take nothing. The kernel asks for more only once a third of its buffer, of
some MB, is free: a slow client needs a while for that."""


class BoundedHttp(H11Protocol):
    """Closes a connection whose request does not arrive in time or whose answer is not read."""

    _awaited: Any = None  # what is missing of a request: its state, and the latest request
    _late: Any = None  # timers, of asyncio or of uvloop
    _next_look: Any = None
    _unsent = 0  # bytes, at the last look

    def connection_made(self, transport: Any) -> None:  # of asyncio or of uvloop
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch()
        self._next_look = self.loop.call_later(UNREAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop()
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch()

    def resume_writing(self) -> None:
        """Note that the client reads."""
        self._unsent = 0
        super().resume_writing()

    def _watch(self) -> None:
        """Bound the time that the rest of the head, or of the body, takes."""
        state = self.conn.their_state
        if self._awaited == (state, self.cycle):
            return
        self._stop()
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: BODY_SECONDS}.get(state)
        if seconds is not None:
            self._awaited = (state, self.cycle)
            self._late = self.loop.call_later(seconds, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self._awaited = None

    def _look(self) -> None:
        """Drop the connection if its client has taken nothing since the last look."""
        unsent = self.transport.get_write_buffer_size()
        # Nothing is added to it then, so that it shrinks unless nobody reads.
        is_full = self.flow.write_paused or self.transport.is_closing()
        if is_full and unsent and unsent == self._unsent:
            self.transport.abort()
            return
        self._unsent = unsent if is_full else 0
        self._next_look = self.loop.call_later(UNREAD_SECONDS, self._look)
