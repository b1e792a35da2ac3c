"""Connections end that send no request, and nobody is let in before the models are loaded."""

import contextlib
import socket
import time

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


def read_to_end(connection):
    """What arrives until the connection ends, however it ends."""
    arrived = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            arrived += piece
    return arrived


@pytest.mark.parametrize("seconds", [0.3, 5.0])
def test_a_body_that_goes_on_after_its_answer_is_not_waited_for(client, monkeypatch, seconds):
    """An answer that needs no body, 405 here, must not keep the connection for who drips one."""
    monkeypatch.setattr(bounded_http, "BODY_SECONDS", seconds)
    head = b"POST /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(head)
        assert b"405 Method" in connection.recv(1000)
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 2:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert (time.monotonic() - start < 2) == (seconds < 2)


def test_a_body_that_is_in_time_may_follow_its_answer(client):
    head = b"POST /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(head)
        assert b"405 Method" in connection.recv(1000)
        connection.sendall(b"bodyGET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)


def test_a_client_that_reads_nothing_loses_its_connection(client, monkeypatch):
    monkeypatch.setattr(bounded_http, "UNREAD_SECONDS", 0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(8)
        connection.connect(("127.0.0.1", client.port))
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 100_000
        with pytest.raises(ConnectionError):  # not the time-out: the server resets it
            connection.sendall(ask)


def test_a_client_that_reads_slowly_keeps_its_connection(client, monkeypatch):
    monkeypatch.setattr(bounded_http, "UNREAD_SECONDS", 0.3)
    asked = 600  # more than the kernel's buffers hold
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", client.port))
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        connection.sendall((ask + b"\r\n") * (asked - 1) + ask + b"Connection: close\r\n\r\n")
        arrived = 0
        while piece := connection.recv(1 << 17):
            arrived += piece.count(b"HTTP/1.1 200 OK")
            time.sleep(0.01)
        assert arrived == asked


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
