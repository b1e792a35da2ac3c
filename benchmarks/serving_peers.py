"""Our server beside `generate` of transformers and beside llama.cpp's server.

Beside `generate`, which is called directly: a base with a value network, random weights, greedy
answers of one length, 32 clients and one client. Beside llama.cpp's server, which knows no value
networks: SmolLM2-135M-Instruct alone, the same chat requests by the same clients, one and eight at
a time. It computes with 4-bit weights (Q4_1), ours with the same weights as float32, bfloat16 and
int8. The server of llama-cpp-python answers one request after the other, and does not read again
what a prompt has in common with the one before (here the system message); ours reads each whole.
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.chat_prompts import EXPLANATIONS
from benchmarks.decode_contest import random_prompts
from benchmarks.llama_cpp_server import (
    LlamaCpp,
    PeerMissingError,
    find_llama_cpp,
    running_llama_cpp,
)
from benchmarks.report import Options, Peer, Report, Row
from benchmarks.running_server import (
    ONE_DEVICE,
    VALUE,
    compiled_runs,
    random_pair,
    server_config,
)
from benchmarks.serving_clients import Outcome, Sent, send_from_process
from benchmarks.setting import thread_count
from benchmarks.shapes import BASE_A, BASE_C, VALUE_A, VALUE_C, parameter_count
from benchmarks.smollm2 import NO_FOLDER, find_folder
from benchmarks.timing import Figures, time_in_turn
from ivl_jax.config import ComposedModelConfig
from ivl_jax.model.architecture import ArchConfig
from ivl_jax.serving.background import BackgroundServer
from ivl_jax.serving.server import prepare

ABOUT = "a server of ours beside `generate` of transformers, and beside llama.cpp's server"

_GENERATE = "transformers generate"
_LLAMA_CPP = "llama.cpp's server, Q4_1"
# Off, as in OpenAI's API and in ours: it changes what greedy decoding chooses.
_LLAMA_CPP_FIELDS = {"repeat_penalty": 1.0}
_CHAT = "/v1/chat/completions"
_MODEL = "smollm2"
_OURS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"int8_base": True},
}


class Plan(NamedTuple):
    """How much is asked."""

    base: ArchConfig
    """Beside `generate`."""
    value: ArchConfig
    batches: dict[int, int]
    """Clients beside `generate`, which decodes as many together → their requests."""
    prompt: int
    """Tokens of a prompt beside `generate`."""
    clients: dict[int, int]
    """Clients beside llama.cpp → their requests."""
    numbers: tuple[str, ...]
    """What our weights are held as beside llama.cpp."""
    new_tokens: int
    """Of an answer, at most."""
    repeats: int


_FULL = Plan(BASE_A, VALUE_A, {32: 32, 1: 2}, 32, {1: 3, 8: 16}, tuple(_OURS), 48, 5)
_QUICK = Plan(BASE_C, VALUE_C, {4: 4, 1: 1}, 16, {1: 1, 2: 4}, ("float32",), 8, 1)


def run(options: Options) -> Report:
    """Measure beside each peer that is there.

    Args:
        options: quick: pair C, few clients, 8 new tokens, float32 alone, one repeat.

    Returns:
        The report; it names the peers that are missing.
    """
    plan = _QUICK if options.quick else _FULL
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    shapes: dict[str, object] = {"new tokens, at most": plan.new_tokens}
    if find_spec("torch") is None:
        skipped[_GENERATE] = "the extra `torch` is not installed"
    else:
        rows += _generate_rows(plan)
        shapes |= {
            f"beside {_GENERATE}: base": parameter_count(plan.base),
            "value": parameter_count(plan.value),
            "prompt": plan.prompt,
        }
    folder = find_folder()
    try:
        peer = find_llama_cpp()
    except PeerMissingError as missing:
        skipped["llama.cpp's server"] = str(missing)
    else:
        if folder is None:
            skipped["llama.cpp's server"] = NO_FOLDER
        else:
            rows += _chat_rows(folder, peer, plan)
            shapes |= {"beside llama.cpp": f"SmolLM2-135M-Instruct, {peer.version}"}
    return Report(
        rows, dtype="float32 where rows do not say otherwise", shapes=shapes, skipped=skipped
    )


def _generate_rows(plan: Plan) -> Iterator[Row]:
    """Clients of a server of a base with a value network, beside `generate` without a server."""
    import torch
    from transformers import LlamaForCausalLM

    from benchmarks.generate_peer import write_answers

    torch.set_num_threads(thread_count())
    with tempfile.TemporaryDirectory(prefix="ivl-serving-peers-") as folder:
        pair = random_pair(Path(folder), plan.base, plan.value)
        prepared = prepare(server_config(pair, rows=max(plan.batches)))
        base, value = (
            LlamaForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32).eval()
            for name in ("base", VALUE)
        )
    prompts = random_prompts(max(plan.batches), plan.base.vocab_size)[:, : plan.prompt].tolist()

    def served(port: int, clients: int) -> tuple[int, float]:
        options = {"model": VALUE, "temperature": 0, "seed": 0, "max_tokens": plan.new_tokens}
        asked = prompts[: plan.batches[clients]]
        requests = [Sent({**options, "prompt": prompt}) for prompt in asked]
        outcome = _answered(port, requests, clients)
        return outcome.tokens, outcome.seconds

    def generated(batch: int) -> tuple[int, float]:
        asked = prompts[: plan.batches[batch]]
        start = time.perf_counter()
        for first in range(0, len(asked), batch):
            some = asked[first : first + batch]
            write_answers(base, value, some, [plan.new_tokens] * len(some), greedy=True)
        return plan.new_tokens * len(asked), time.perf_counter() - start

    with BackgroundServer(prepared) as server:
        for clients in plan.batches:
            works = {
                "ours": functools.partial(served, server.port, clients),
                _GENERATE: functools.partial(generated, clients),
            }
            rates = _rates(works, plan.repeats)
            yield Row(
                f"base and value network, {_clients(clients)}",
                rates["ours"],
                "tokens/s",
                "higher",
                peer=Peer(f"{_GENERATE}, batch {clients}", rates[_GENERATE].median),
            )


def _chat_rows(folder: Path, peer: LlamaCpp, plan: Plan) -> Iterator[Row]:
    """The base alone, in several formats of numbers, beside llama.cpp's server."""
    rows = max(plan.clients)
    with contextlib.ExitStack() as servers:
        start = functools.partial(running_llama_cpp, threads=thread_count())
        ports = {_LLAMA_CPP: servers.enter_context(start(peer))}
        for name in plan.numbers:
            model = ComposedModelConfig(base=str(folder), mesh=ONE_DEVICE, **_OURS[name])
            config = server_config(model, rows=rows, name=_MODEL)
            ports[name] = servers.enter_context(BackgroundServer(prepare(config))).port

        def chat(name: str, clients: int) -> tuple[int, float]:
            questions = EXPLANATIONS[: plan.clients[clients]]
            requests = [_chat_request(name, one, plan.new_tokens) for one in questions]
            outcome = _answered(ports[name], requests, clients)
            return outcome.tokens, outcome.seconds

        for clients in plan.clients:
            works = {name: functools.partial(chat, name, clients) for name in ports}
            rates = _rates(works, plan.repeats)
            for name in plan.numbers:
                yield Row(
                    f"SmolLM2-135M alone, {name}, {_clients(clients)}",
                    rates[name],
                    "tokens/s",
                    "higher",
                    peer=Peer(_LLAMA_CPP, rates[_LLAMA_CPP].median),
                )
        yield from _first_token_rows(ports, plan)


def _first_token_rows(ports: dict[str, int], plan: Plan) -> Iterator[Row]:
    """Milliseconds until one client's first token, each time of another question than before."""
    firsts: dict[str, list[float]] = {name: [] for name in ports}

    def first_token(name: str) -> None:
        question = EXPLANATIONS[len(firsts[name]) % len(EXPLANATIONS)]
        outcome = _answered(ports[name], [_chat_request(name, question, 4, stream=True)], 1)
        firsts[name].append(1000 * outcome.answers[0].first)

    works = {name: functools.partial(first_token, name) for name in ports}
    time_in_turn(works, repeats=plan.repeats, warm_up=2)
    figures = {name: Figures.of(each[-plan.repeats :]) for name, each in firsts.items()}
    for name in plan.numbers:
        yield Row(
            f"SmolLM2-135M alone, {name}, time to the first token, one client",
            figures[name],
            "ms",
            peer=Peer(_LLAMA_CPP, figures[_LLAMA_CPP].median),
        )


def _rates(
    works: Mapping[str, Callable[[], tuple[int, float]]], repeats: int
) -> dict[str, Figures]:
    """Tokens per second of works that return tokens and seconds, run in turn."""
    for work in works.values():
        work()
    runs = compiled_runs(works, repeats=repeats)
    return {
        name: Figures.of(tokens / seconds for tokens, seconds in each)
        for name, each in runs.items()
    }


def _answered(port: int, requests: Sequence[Sent], clients: int) -> Outcome:
    """Send requests; all must be answered."""
    outcome = send_from_process(port, requests, clients=clients)
    if outcome.lost:
        statuses = sorted({answer.status for answer in outcome.answers})
        raise RuntimeError(f"{outcome.lost} of {len(requests)} requests were lost: {statuses}")
    return outcome


def _chat_request(server: str, question: str, new_tokens: int, *, stream: bool = False) -> Sent:
    body = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": new_tokens,
        "stream": stream,
        **(_LLAMA_CPP_FIELDS if server == _LLAMA_CPP else {}),
    }
    return Sent(body, path=_CHAT)


def _clients(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"
