"""A server that is told to stop ends in time, whatever is still going on."""

import contextlib
import dataclasses
import http.client
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
