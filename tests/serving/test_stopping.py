"""A server that is told to stop ends in time, whatever is still going on."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from starlette.applications import Starlette

from ivl_jax.serving import server
from ivl_jax.serving.app import Service
from tests.serving.conftest import running


def test_neither_a_stream_nor_a_load_nor_a_long_step_holds_up_the_end(
    serve_config, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    (tmp_path / "more").mkdir()
    config = dataclasses.replace(serve_config, values_dir=str(tmp_path), drain_seconds=1.0)
    over, waiting = threading.Event(), []

    def blocked(*_, **__):
        waiting.append(1)
        over.wait(60)

    def ask(client, path, body):
        with contextlib.suppress(OSError, http.client.HTTPException):
            client.send("POST", path, body)

    try:
        with running(config) as client:
            service = client.prepared.service
            monkeypatch.setattr(service.engine, "_step", blocked)
            monkeypatch.setattr(service.values._loader, "check", blocked)
            stream = {"model": "mine", "prompt": "A", "stream": True}
            value = {"name": "more", "folder": "more"}
            for path, body in (("/v1/completions", stream), ("/v1/values", value)):
                threading.Thread(target=ask, args=(client, path, body)).start()
            while len(waiting) < 2:
                time.sleep(0.01)
            start = time.monotonic()
        assert time.monotonic() - start < 20
        assert "choices that still run or wait: 1; they have 1 s (--drain-seconds)" in caplog.text
    finally:
        over.set()


def test_requests_that_the_end_cuts_off_get_an_error_of_their_own(
    serve_config, monkeypatch, caplog
):
    """Status 503, or an error as a stream's last event; not 500, nor a traceback in the log."""
    config = dataclasses.replace(serve_config, drain_seconds=1.0)
    over, waiting, answers = threading.Event(), [], {}

    def ask(client, **more):
        answer = client.complete("mine", "A", max_tokens=200, temperature=0, **more)
        answers["stream" if more else "whole"] = answer

    try:
        with running(config) as client:
            engine = client.prepared.service.engine
            step = engine._step

            def blocked():
                step()
                if engine._engine.running == 2:  # both have begun
                    waiting.append(1)
                    over.wait(60)

            monkeypatch.setattr(engine, "_step", blocked)
            asking = [
                threading.Thread(target=ask, args=(client,), kwargs=more)
                for more in ({}, {"stream": True, "logprobs": 0})
            ]
            for one in asking:
                one.start()
            while not waiting:
                time.sleep(0.01)
        for one in asking:
            one.join(20)
    finally:
        over.set()
    status, body = answers["whole"]
    assert (status, body["error"]["code"]) == (503, "unavailable")
    status, text = answers["stream"]
    *_, last = text.strip().split("\n\n")
    assert status == 200
    assert "the server is stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in caplog.text


def test_what_threads_still_do_does_not_keep_the_process_alive(serve_config, monkeypatch):
    class Stopped:
        def run(self, sockets):
            raise KeyboardInterrupt

    ends_at_once = threading.Event()
    monkeypatch.setattr(server, "ends_at_once", ends_at_once)
    monkeypatch.setattr(server, "make_server", lambda _: Stopped())
    listening = server.take_port("127.0.0.1", 0)
    with pytest.raises(KeyboardInterrupt), listening:
        server.serve(server.Prepared(serve_config, Starlette(), object.__new__(Service), listening))
    assert ends_at_once.is_set()
