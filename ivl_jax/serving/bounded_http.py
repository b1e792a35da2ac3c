"""HTTP/1.1 whose requests must arrive in time: a connection that says nothing is closed.

In: bytes of a connection. Out: requests for the application. Uvicorn bounds the size of a request's
head and how long a connection may idle after an answer; here is the time for the head of the first
request and of each further one.
"""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
"""How long the head of a request may take."""


class BoundedHttp(H11Protocol):
    """Closes a connection whose request's head is not complete in time."""

    _late: Any = None  # a timer, of asyncio or of uvloop

    def connection_made(self, transport: Any) -> None:  # of asyncio or of uvloop
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # a head has arrived
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
