"""A request is admitted before its prompts are encoded, and encoding is part of its time."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


class Gate:
    """Holds up the encoding of prompts until it is opened."""

    def __init__(self, encode):
        self._encode, self._open, self.passed = encode, threading.Event(), []

    def encode(self, *arguments, **named):
        self._open.wait(20)
        self.passed.append(True)
        return self._encode(*arguments, **named)

    def open(self):
        self._open.set()


@pytest.fixture
def gate(client, monkeypatch):
    catalogue = client.prepared.service.catalogue
    gate = Gate(catalogue.encode)
    monkeypatch.setattr(catalogue, "encode", gate.encode)
    yield gate
    gate.open()


def limit(client, monkeypatch, **changes):
    config = dataclasses.replace(client.prepared.config, **changes)
    monkeypatch.setattr(client.prepared.service.front, "_config", config)


def wait_for_in_flight(client, expected):
    deadline = time.monotonic() + 10
    while client.send("GET", "/health")[1]["in_flight"] != expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_choices_that_are_being_encoded_count_so_a_full_queue_refuses(client, gate, monkeypatch):
    limit(client, monkeypatch, max_rows=1, max_waiting=1)
    with concurrent.futures.ThreadPoolExecutor(1) as clients, contextlib.ExitStack() as stack:
        stack.callback(gate.open)
        waiting = clients.submit(client.complete, "mine", n=2, max_tokens=1)
        wait_for_in_flight(client, 2)
        status, answer = client.complete("mine", max_tokens=1)
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        gate.open()
        assert waiting.result()[0] == 200
    assert client.complete("nobody")[0] == 404  # it gives up its place too
    assert client.send("GET", "/health")[1]["in_flight"] == 0


def test_encoding_counts_as_waiting_for_the_first_token(client, gate, monkeypatch):
    limit(client, monkeypatch, queue_seconds=0.1)
    status, answer = client.complete("mine", max_tokens=1)
    assert (status, answer["error"]["code"]) == (503, "timeout")
    assert "has no token yet" in answer["error"]["message"]
    assert not gate.passed
    assert client.send("GET", "/health")[1]["in_flight"] == 0


def test_a_client_that_leaves_while_its_prompt_is_encoded_gives_up_its_place(client, gate):
    for streams in (True, False):
        body = json.dumps({"model": "mine", "prompt": "A", "max_tokens": 4, "stream": streams})
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_for_in_flight(client, 1)
        connection.close()
        wait_for_in_flight(client, 0)
    assert not gate.passed
    values = client.prepared.service.catalogue.values.values()
    assert [value.holders for value in values] == [0, 0]
