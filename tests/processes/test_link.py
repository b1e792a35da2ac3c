"""The link forwards bytes both ways, and hides the coordinator's end while it is told to."""

import socket

import pytest

from ivl_jax.processes.link import CoordinatorLink


@pytest.fixture
def pair():
    """A link, this process's end of a connection through it, and the coordinator's end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = CoordinatorLink(f"localhost:{server.getsockname()[1]}")
        host, port = link.address.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as near:
            far, _ = server.accept()
            with far:
                yield link, near, far


def test_bytes_go_both_ways(pair):
    _, near, far = pair
    near.sendall(b"question")
    assert far.recv(100) == b"question"
    far.sendall(b"answer")
    assert near.recv(100) == b"answer"


def test_the_end_of_the_coordinator_is_passed_on_before_it_is_watched(pair):
    link, near, far = pair
    far.close()
    assert near.recv(100) == b""
    assert not link.lost.is_set()


def test_the_end_of_a_watched_coordinator_is_noted_and_hidden(pair):
    link, near, far = pair
    link.hold(True)
    far.close()
    assert link.lost.wait(10)
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.recv(100)


def test_the_end_of_this_process_is_passed_on(pair):
    link, near, far = pair
    link.hold(True)
    near.close()
    assert far.recv(100) == b""


def test_a_coordinator_that_is_not_there_refuses():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    host, port = CoordinatorLink(f"[::1]:{port}").address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as near:
        assert near.recv(100) == b""
