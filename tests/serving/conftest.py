import contextlib
import dataclasses
import http.client
import json

import pytest

from ivl_jax.checkpoint import save_value
from ivl_jax.config import ComposedModelConfig, MeshConfig, ServeConfig
from ivl_jax.weights.language_model import load_language_model
from tests.decoding.conftest import make_value
from tests.decoding.tiny import tiny_arch

ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)
STRENGTHS = (0.3, -0.2)


class Client:
    """A client of one server over a real socket."""

    def __init__(self, port, prepared):
        self.port, self.prepared = port, prepared

    def send(self, method, path, body=None, **headers):
        """(status, body) of one request; a body that is no text is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, str | bytes):
                body = json.dumps(body)
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if body is not None:
                headers.setdefault("content-type", "application/json")
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode()
        kind = response.headers.get("content-type", "")
        return response.status, json.loads(text) if "json" in kind else text

    def post(self, path, **body):
        return self.send("POST", path, body)

    def chat(self, model, text="Once upon a time", **more):
        return self.post(
            "/v1/chat/completions",
            model=model,
            messages=[{"role": "user", "content": text}],
            **more,
        )

    def complete(self, model, prompt="Once upon a time", **more):
        return self.post("/v1/completions", model=model, prompt=prompt, **more)

    def text(self, model, prompt, **more):
        """The greedy text of one completion."""
        status, body = self.complete(model, prompt, temperature=0, **more)
        assert status == 200, body
        return body["choices"][0]["text"]

    def events(self, path, **body):
        """The events of a stream, [DONE] apart."""
        status, text = self.send("POST", path, {**body, "stream": True})
        assert status == 200, text
        lines = [line for line in text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]" or "error" in lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines if "[DONE]" not in line]

    def figures(self):
        """The figures of /metrics, by name and labels."""
        _, text = self.send("GET", "/metrics")
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@contextlib.contextmanager
def running(config):
    """A server of these flags, on a port of its own."""
    from ivl_jax.serving.background import BackgroundServer
    from ivl_jax.serving.server import prepare

    prepared = prepare(config)
    with BackgroundServer(prepared) as server:
        yield Client(server.port, prepared)


@pytest.fixture(scope="session")
def folders(stories260k_dir, tmp_path_factory):
    """A base and two value folders; the second has another template and a smaller context."""
    base = load_language_model(stories260k_dir)
    paths = [str(stories260k_dir)]
    for index, (name, context) in enumerate([("mine", 512), ("other", 160)]):
        arch = tiny_arch(width=16, heads=2, kv_heads=1, layers=1, rows=512, context=context)
        value = make_value(base, seed=index, arch=arch)
        metadata = dataclasses.replace(
            value.metadata, chat_template=["plain", "vicuna"][index], stop_ids=(*base.stop_ids, 40)
        )
        folder = tmp_path_factory.mktemp(name) / "value"
        save_value(folder, params=value.params, metadata=metadata, tokenizer=value.tokenizer)
        paths.append(str(folder))
    return paths


@pytest.fixture(scope="session")
def serve_config(folders):
    base, *values = folders
    names = [f"{name}={path}" for name, path in zip(("mine", "other"), values, strict=True)]
    model = ComposedModelConfig(base=base, value=tuple(names), strength=STRENGTHS, mesh=ONE_DEVICE)
    return ServeConfig(
        model,
        name="stories",
        port=0,
        max_rows=4,
        max_waiting=8,
        drain_seconds=5.0,
        warm_up=False,
    )


@pytest.fixture(scope="module")
def client(serve_config):
    with running(serve_config) as client:
        yield client
