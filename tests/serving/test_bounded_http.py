"""Connections end that send no request, and nobody is let in before the models are loaded."""

import socket

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from ivl_jax.serving import bounded_http, server


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local", b"GET /heal"])
def test_a_connection_whose_head_does_not_arrive_is_closed(client, monkeypatch, sent):
    monkeypatch.setattr(bounded_http, "HEAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b""


def test_a_connection_that_goes_on_to_send_half_a_head_is_closed_too(client, monkeypatch):
    monkeypatch.setattr(bounded_http, "HEAD_SECONDS", 0.2)
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(whole)
        assert b"200 OK" in connection.recv(1000)
        connection.sendall(whole[:20])
        while connection.recv(1000):
            pass


def test_a_slow_answer_is_not_cut_off(client, monkeypatch):
    monkeypatch.setattr(bounded_http, "HEAD_SECONDS", 0.01)
    assert client.complete("stories", max_tokens=64, temperature=0)[0] == 200


def test_until_it_listens_clients_are_refused_at_once():
    with server.take_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        taken.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_open_connections_are_bounded(client):
    limit = server.make_server(client.prepared).config.limit_concurrency
    assert limit == 8 * (4 + 8) + 8


def test_requests_are_counted_by_route(client):
    client.send("DELETE", "/v1/values/absent")
    client.send("GET", "/v1/models/stories")
    client.send("GET", "/nothing")
    paths = {name for name in client.figures() if name.startswith("ivl_requests")}
    for path in ('path="/v1/values/{name}"', 'path="/v1/models/{name}"', 'path="other"'):
        assert any(path in name for name in paths), path
