"""The way to the coordinator, which stays open when the coordinator is gone.

In: the coordinator's address. Out: an address on this machine that forwards to it, and whether the
connection was lost.

JAX's client aborts the process, with a stack dump, as soon as its connection to the coordinator
closes, and takes no callback from Python. Through this link it never sees that: the watch does, and
ends the process with one line.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

_BLOCK_BYTES = 1 << 16


class CoordinatorLink:
    """A port of this machine whose connections are forwarded to the coordinator.

    Attributes:
        address: to be used instead of the coordinator's.
        lost: set once a connection was closed by the other side while `hold` was on.
    """

    def __init__(self, coordinator: str) -> None:
        """Open the port.

        Args:
            coordinator: HOST:PORT of the coordinator, which need not be there yet.
        """
        host, _, port = coordinator.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self.lost = threading.Event()
        self._hold = threading.Event()
        self._kept: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        _start(self._accept)

    def hold(self, on: bool) -> None:
        """Keep connections open towards this process when the coordinator closes them, or not."""
        (self._hold.set if on else self._hold.clear)()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target)
            except OSError:  # not there yet, in which case JAX tries again, or gone
                if not self._lose(near):
                    near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _start(self._send, near, far)
            _start(self._receive, far, near)

    def _send(self, near: socket.socket, far: socket.socket) -> None:
        """Forward to the coordinator until this process closes the connection."""
        while block := _read(near):
            try:
                far.sendall(block)
            except OSError:
                if self._lose(near):
                    return
                break
        _shut(near, far)

    def _receive(self, far: socket.socket, near: socket.socket) -> None:
        """Forward from the coordinator until it closes the connection."""
        while block := _read(far):
            try:
                near.sendall(block)
            except OSError:
                break
        else:
            if self._lose(near):
                return
        _shut(near, far)

    def _lose(self, near: socket.socket) -> bool:
        """With `hold`, note that the coordinator is gone and keep this side open."""
        if not self._hold.is_set():
            return False
        self._kept.append(near)  # or it would be closed as garbage
        self.lost.set()
        return True


def _read(source: socket.socket) -> bytes:
    """The next bytes; none once the connection is closed or broken."""
    try:
        return source.recv(_BLOCK_BYTES)
    except OSError:
        return b""


def _shut(*ends: socket.socket) -> None:
    """End connections in both directions; threads that read from them return."""
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _start(target: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True, name="coordinator link").start()
