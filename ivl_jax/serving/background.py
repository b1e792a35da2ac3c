"""A server in a thread of this process, until it is closed.

In: what `server.prepare` returned. Out: its port while it answers.
"""

import threading
import time
from typing import TypeVar

from ivl_jax.serving.server import Prepared, make_server

_POLL_SECONDS = 0.02
_Server = TypeVar("_Server", bound="BackgroundServer")


class BackgroundServer:
    """A server that answers once this is made.

    Args:
        prepared: a server that is ready to run.

    Attributes:
        port: The port it listens on.

    Raises:
        RuntimeError: the server has failed to start.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.port: int = prepared.listening.getsockname()[1]
        self._server = make_server(prepared)
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [prepared.listening]},
            name="ivl-serve",
            daemon=True,
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server has failed to start: the log says why")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Let running requests finish, and stop."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self: _Server) -> _Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
