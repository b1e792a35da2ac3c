"""Which names of the server requests may use: pages of other sites reach it by none of their own.

In: the `Host` header of a request. Out: the request is passed on, or refused with status 403.

A site can have its own name resolve to 127.0.0.1 (DNS rebinding). The browser then takes the
server for that site, and lets its pages read every answer; but `Host` still has the site's name.
"""

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ivl_jax.serving.errors import ApiError, error_response

ANY_HOST = "*"
"""Allows every name."""


class KnownHosts:
    """Lets requests in that name the server by a name that it knows.

    Args:
        app: what is asked then.
        listens_on: the address that the server listens on.
        allowed: further names: `NAME`, `*.NAME` for all below it, or `*` for any. Without them, a
            server that other machines can reach answers to every name.
    """

    def __init__(self, app: ASGIApp, *, listens_on: str, allowed: Sequence[str]) -> None:
        self._app, self._listens_on, self._allowed = app, listens_on, tuple(allowed)
        self._checks = ANY_HOST not in allowed and (bool(allowed) or _is_local(_plain(listens_on)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and self._checks:
            # Browsers always send the header; what sends none is not a page.
            for name, value in scope["headers"]:
                host = value.decode("latin-1")
                if name == b"host" and not is_known(host, self._listens_on, *self._allowed):
                    await _refuse(host, scope, receive, send)
                    return
        await self._app(scope, receive, send)


def is_known(host: str, *names: str) -> bool:
    """Whether a `Host` header has one of these names, or one that always means this machine.

    Args:
        host: a name or an address, perhaps with a port.
        names: names and addresses; `*.NAME` stands for all below it.

    Example:
        >>> [is_known(host, "*.a.org") for host in ("localhost:80", "[::1]:80", "b.a.org")]
        [True, True, True]
        >>> [is_known(host, "*.a.org") for host in ("evil.test:80", "a.org", "10.0.0.1")]
        [False, False, False]
    """
    asked = _plain(host)
    return _is_local(asked) or any(
        asked.endswith(name[1:]) if name.startswith("*.") else asked == name
        for name in map(_plain, names)
    )


def _plain(host: str) -> str:
    """A name or an address without its port, in lower case."""
    if host.startswith("["):  # an IPv6 address
        return host[1:].partition("]")[0].lower()
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.lower().removesuffix(".")


def _is_local(name: str) -> bool:
    """Whether a name or an address always means this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _refuse(host: str, scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        403,
        f"the Host header names {host!r:.100}, which is not a name of this server: ask it as "
        "localhost or 127.0.0.1, or start it with --allowed-hosts and that name",
        code="host_not_allowed",
    )
    await error_response(error)(scope, receive, send)
