"""Clients that disconnect at random cost nobody an answer, and leave nothing behind."""

import asyncio
import random
import time

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from benchmarks.serving_clients import Sent, send_all

_REQUESTS, _CLIENTS = 40, 8


def test_clients_that_leave_at_random_lose_no_other_request_and_leak_no_row(client):
    chance, prompt = random.Random(3), "Once upon a time"
    before = client.figures()["ivl_disconnects_total"]
    requests = []
    for number in range(_REQUESTS):
        body = {
            "model": chance.choice(["stories", "mine", "other"]),
            "prompt": prompt,
            "max_tokens": chance.randint(1, 30),
            "temperature": 0,
        }
        if chance.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        # Some leave at once, some in the middle of an answer; every second one stays.
        leaves_after = chance.uniform(0.0, 0.3) if number % 2 else None
        if leaves_after is not None:
            body["max_tokens"] = 120
        requests.append(Sent(body, leaves_after))
    outcome = asyncio.run(send_all(client.port, requests, clients=_CLIENTS))
    assert outcome.lost == 0
    left = sum(answer.left for answer in outcome.answers)
    assert left > 5
    for request, answer in zip(requests, outcome.answers, strict=True):
        if not answer.left:
            assert 0 < answer.tokens <= request.body["max_tokens"]
    deadline = time.monotonic() + 30
    while client.send("GET", "/health")[1]["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while (figures := client.figures())["ivl_running"] + figures["ivl_waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert client.prepared.service.engine.load == 0
    values = client.prepared.service.catalogue.values.values()
    assert [value.holders for value in values] == [0, 0]
    assert 0 < figures["ivl_disconnects_total"] - before <= left
