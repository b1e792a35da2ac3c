"""ivl-serve's command line: what is refused before a weight is read, and how it stops."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from ivl_jax.commands.serve import main
from ivl_jax.config import ComposedModelConfig, ConfigError, ServeConfig, check_serve_config


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ({"base": ""}, {}, "--base is missing"),
        ({"value": ("runs/a/value", "runs/b/a")}, {}, "two models are named a: name them with"),
        ({"value": ("L=runs/a",)}, {}, "two models are named L"),
        ({"value": ("a=",)}, {}, "cannot start:\n  - --value a=: expected NAME=FOLDER"),
        ({"value": ("a=x",), "map": ("x.safetensors",)}, {}, "expected NAME=FILE, with the name"),
        ({"value": ("a=x",), "map": ("b=x",)}, {}, "no --value is named b; found a"),
        ({"value": ("a=x",), "map": ("a=x", "a=y")}, {}, "--map a=y: a has a map already: x"),
        ({"value": ("a=x",), "strength": (1.0, 2.0)}, {}, "1 value(s), but --strength is given 2"),
        ({"value": ("none", "a=x")}, {}, "--value none (the base alone) cannot be combined"),
        ({}, {"name": "a b"}, "'a b' cannot be a model's name"),
    ],
)
def test_names_that_conflict_are_refused(model, more, message):
    flags = ComposedModelConfig(**{"base": "models/L", **model})
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_serve_config(ServeConfig(flags, **more))


def test_values_and_maps_are_matched_by_name():
    flags = ComposedModelConfig(
        base="B", value=("a=runs/x=y/value", "runs/b/value"), map=("b=m.safetensors",)
    )
    named = check_serve_config(ServeConfig(flags))
    assert named.values == ("a", "b")
    assert named.model.value == ("runs/x=y/value", "runs/b/value")
    assert named.model.map == ("none", "m.safetensors")


def test_flags_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="--max-rows must be ≥ 1, got 0; --max-choices must be"):
        ServeConfig(max_rows=0, max_choices=-1)
    with pytest.raises(ConfigError, match=r"--port must be in \[0, 65535\], got 70000"):
        ServeConfig(port=70000)
    with pytest.raises(ConfigError, match="--prefill-block must be 0 or ≥ 64, got 63"):
        ServeConfig(prefill_block=63)


def test_the_engine_gets_the_limits_of_the_flags():
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from ivl_jax.serving.server import engine_limits

    limits = engine_limits(
        ServeConfig(max_rows=3, prefill_block=128, max_cache_mib=2), free=1 << 30
    )
    assert (limits.max_rows, limits.prefill_block, limits.max_cache_bytes) == (3, 128, 2 << 20)
    assert engine_limits(ServeConfig(prefill_block=0), free=None).prefill_block is None
    assert engine_limits(ServeConfig(), free=None).prefill_block == 512


def test_caches_are_bounded_by_the_free_memory_unless_a_flag_says_otherwise():
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from ivl_jax.serving.server import engine_limits

    assert engine_limits(ServeConfig(), free=20 << 30).max_cache_bytes == 18 << 30
    assert engine_limits(ServeConfig(), free=1 << 30).max_cache_bytes == 768 << 20
    assert engine_limits(ServeConfig(), free=100 << 20).max_cache_bytes == 50 << 20
    assert engine_limits(ServeConfig(), free=None).max_cache_bytes is None


def test_a_port_that_is_taken_is_said_before_a_model_is_looked_for(monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["ivl-serve", "--base", "absent", "--port", str(port)])
        assert main() == 2
    said = capsys.readouterr().err
    assert f"--port {port} of 127.0.0.1 is taken by another program" in said
    monkeypatch.setattr(sys, "argv", ["ivl-serve", "--base", "absent", "--host", "203.0.113.1"])
    assert main() == 2
    assert "cannot listen on --host 203.0.113.1" in capsys.readouterr().err


def test_sigterm_lets_a_running_answer_finish(folders, project_root):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    base, mine, _ = folders
    flags = [
        "--base",
        base,
        "--value",
        f"mine={mine}",
        "--port",
        "0",
        "--mesh.tensor",
        "1",
        "--no-warm-up",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "ivl_jax.commands.serve", *flags],
        cwd=project_root,
        env={**os.environ, "PYTHONPATH": str(project_root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                break
        body = b'{"model": "mine", "prompt": "A", "max_tokens": 300, "stream": true}'
        request = urllib.request.Request(
            f"{found[1]}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            first = answer.readline()
            server.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert first.startswith(b"data: ")
        assert '"finish_reason":"' in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert server.wait(timeout=60) == 128 + signal.SIGTERM
        assert "stopped serving (SIGTERM)" in server.stderr.read()
    finally:
        server.kill()
        server.stderr.close()
        server.wait()
