"""A request that calls the server by another site's name is refused."""

import asyncio
import json
import re

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ivl_jax.config import ConfigError, ServeConfig
from ivl_jax.serving.hosts import KnownHosts


@pytest.mark.parametrize(
    ("listens_on", "allowed", "host", "known"),
    [
        ("127.0.0.1", (), "127.0.0.1:8000", True),
        ("127.0.0.1", (), "LOCALHOST.:8000", True),
        ("127.0.0.1", (), "[::1]:8000", True),
        ("127.0.0.1", (), "rebound.test:8000", False),
        ("127.0.0.1", (), "localhost.rebound.test", False),
        ("localhost", (), "rebound.test", False),
        ("::1", (), "rebound.test", False),
        ("127.0.0.1", ("chat.example.org",), "chat.example.org", True),
        ("127.0.0.1", ("chat.example.org",), "a.chat.example.org", False),
        ("127.0.0.1", ("*.example.org",), "chat.example.org:443", True),
        ("127.0.0.1", ("*.example.org",), "badexample.org", False),
        ("127.0.0.1", ("*",), "rebound.test", True),
        ("0.0.0.0", (), "any.name", True),
        ("0.0.0.0", ("chat.example.org",), "any.name", False),
        ("10.0.0.7", ("chat.example.org",), "10.0.0.7:8000", True),
    ],
)
def test_names_are_known_or_refused(listens_on, allowed, host, known):
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    hosts = KnownHosts(app, listens_on=listens_on, allowed=allowed)
    scope = {"type": "http", "headers": [(b"accept", b"*/*"), (b"host", host.encode())]}
    asyncio.run(hosts(scope, None, send))
    assert bool(reached) == known
    if not known:
        start, body = sent
        error = json.loads(body["body"])["error"]
        assert (start["status"], error["code"]) == (403, "host_not_allowed")
        assert "start it with --allowed-hosts" in error["message"]


def test_the_server_refuses_names_of_other_sites_everywhere(client):
    for path in ("/", "/health", "/v1/models"):
        status, answer = client.send("GET", path, host="rebound.test")
        assert (status, answer["error"]["code"]) == (403, "host_not_allowed")
    assert client.send("GET", "/v1/models", host="localhost:1")[0] == 200


@pytest.mark.parametrize("name", ["http://a.org", "a.org:80", "", "*a.org"])
def test_allowed_hosts_are_names(name):
    with pytest.raises(ConfigError, match=re.escape("--allowed-hosts must be a name")):
        ServeConfig(allowed_hosts=(name,))
