"""After the warm-up, the first requests find their programs compiled."""

import dataclasses

import jax
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from tests.serving.conftest import running


@pytest.fixture
def compiled(monkeypatch):
    """The seconds that each compilation, or reading a compiled program, took."""
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_first_requests_of_each_model_compile_nothing(serve_config, compiled):
    # A size that no other test uses: nothing is compiled yet.
    flags = serve_config.model
    model = dataclasses.replace(flags, value=flags.value[:1], strength=flags.strength[:1])
    config = dataclasses.replace(
        serve_config, model=model, warm_up=True, max_rows=2, default_max_tokens=100
    )
    with running(config) as client:
        assert compiled
        del compiled[:]
        for model in ("stories", "mine"):
            status, answer = client.complete(model, "Lily said", temperature=0, stop=["zz"])
            assert (status, len(answer["choices"])) == (200, 1)
        assert compiled == []
        engine = client.prepared.service.engine
        assert engine.load == 0
