"""A notebook serves the page from its own process, in a frame, and stops it again."""

import http.client
import sys
import types

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from ivl_jax.serving.notebook import NotebookServer
from tests.serving.conftest import Client


def _policy(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    response = connection.getresponse()
    response.read()
    connection.close()
    assert response.status == 200
    return response.headers["content-security-policy"]


def test_the_page_may_be_framed_only_where_a_notebook_serves_it(
    client, serve_config, monkeypatch
) -> None:
    with NotebookServer(serve_config, origins=["http://lab:8888"]) as server:
        allowed = "frame-ancestors 'self' http://localhost:* http://127.0.0.1:* vscode-webview: "
        assert _policy(server.port).endswith(allowed + "http://lab:8888")
        assert Client(server.port, None).text("stories", "Once", max_tokens=2)
        shown = []
        monkeypatch.setattr("IPython.display.display", shown.append)
        server.show(height=200)
        assert shown[0].src == f"http://127.0.0.1:{server.port}/"
        colab = types.SimpleNamespace(
            output=types.SimpleNamespace(
                serve_kernel_port_as_iframe=lambda port, height: shown.append((port, height))
            )
        )
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(colab=colab))
        server.show(height=200)
        assert shown[1] == (server.port, "200")
    with pytest.raises(ConnectionRefusedError):
        _policy(server.port)
    assert _policy(client.port).endswith("frame-ancestors 'none'")
