"""Clients of a server, in a process of their own: they take no time of the server's interpreter.

In: a plan, as JSON on standard input: the port, how many clients there are at a time, and requests
of OpenAI's API. Out: what became of each request, as JSON on standard output.

    python -m benchmarks.serving_clients < plan.json
"""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_USED = re.compile(rb'"completion_tokens": ?(\d+)')
_LIMIT = 1 << 20


class Sent(NamedTuple):
    """A request."""

    body: Mapping[str, Any]
    leaves_after: float | None = None
    """Seconds after which the client disconnects; None: it stays."""
    path: str = "/v1/completions"


class Answered(NamedTuple):
    """What became of a request."""

    status: int
    """Of the answer; 0: the client left before."""
    tokens: int
    """Generated, as its usage says; 0 without one."""
    first: float
    """Seconds until the first byte of the answer, or the first event of a stream, which follows
    the first token."""
    complete: bool
    """Whether the answer came to its end."""
    left: bool
    """Whether the client left."""


class Outcome(NamedTuple):
    """What became of all requests."""

    seconds: float
    """From the first request to the end of the last answer."""
    answers: list[Answered]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def lost(self) -> int:
        """Requests whose client stayed, and that got no whole answer."""
        return sum(not one.left and (one.status != 200 or not one.complete) for one in self.answers)


async def send_all(port: int, requests: Sequence[Sent], *, clients: int) -> Outcome:
    """Send requests, as many at a time as there are clients.

    Args:
        port: of the server on this machine.
        requests: in order.
        clients: how many there are.
    """
    free = asyncio.Semaphore(clients)

    async def send_when_free(request: Sent) -> Answered:
        async with free:
            return await _send(port, request)

    start = time.perf_counter()
    answers = await asyncio.gather(*map(send_when_free, requests))
    return Outcome(time.perf_counter() - start, list(answers))


def send_from_process(port: int, requests: Sequence[Sent], *, clients: int) -> Outcome:
    """As `send_all`, in a process of their own.

    Raises:
        subprocess.CalledProcessError: the process failed.
    """
    plan = json.dumps({"port": port, "clients": clients, "requests": requests})
    command = [sys.executable, "-m", "benchmarks.serving_clients"]
    run = subprocess.run(command, input=plan.encode(), stdout=subprocess.PIPE, check=True)
    seconds, answers = json.loads(run.stdout)
    return Outcome(seconds, [Answered(*answer) for answer in answers])


async def _send(port: int, request: Sent) -> Answered:
    body = json.dumps(request.body).encode()
    head = (
        f"POST {request.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    start = time.perf_counter()
    is_stream = bool(request.body.get("stream"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LIMIT)
    received, first, left = b"", 0.0, False
    try:
        async with asyncio.timeout(request.leaves_after):
            writer.write(head.encode() + body)
            while piece := await reader.read(_LIMIT):
                received += piece
                if not first and (not is_stream or b"\ndata:" in received):
                    first = time.perf_counter() - start
    except TimeoutError:
        left = True
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    used = _USED.findall(received)
    status = int(received.split(b" ", 2)[1]) if received else 0
    # A stream ends with [DONE]; a whole answer is the JSON object that has the usage.
    complete = b"[DONE]" in received if is_stream else bool(used)
    return Answered(status, int(used[-1]) if used else 0, first, complete, left)


def _main() -> None:
    plan = json.load(sys.stdin)
    requests = [Sent(*request) for request in plan["requests"]]
    outcome = asyncio.run(send_all(plan["port"], requests, clients=plan["clients"]))
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    _main()
