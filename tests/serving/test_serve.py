"""A real server on a real socket: what it answers, and that nobody changes anybody's text."""

import concurrent.futures
import dataclasses
import http.client
import json
import time

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from ivl_jax.config import GenerationOptions, StrengthPolicy
from ivl_jax.decoding.compose import compose
from tests.serving.conftest import STRENGTHS, running

PROMPTS = ["Once upon a time", "The big dog ran", "Lily said", "A"]


@pytest.fixture(scope="module")
def alone(folders):
    """What infer.py gives for each set of values, each composed by itself."""
    base, mine, other = folders
    return {
        "stories": compose(base),
        "mine": compose(base, mine, strengths=[STRENGTHS[0]]),
        "stories+other": compose(base, other, strengths=[STRENGTHS[1]]),
        "both": compose(base, mine, other, strengths=[0.1, 0.2]),
    }


def test_greedy_text_is_that_of_each_model_alone_whatever_runs_beside_it(client, alone):
    options = GenerationOptions(max_new_tokens=24)
    asked = [(name, prompt) for prompt in PROMPTS for name in alone]
    expected = {
        (name, prompt): found.text
        for name, model in alone.items()
        for prompt, found in zip(PROMPTS, model.generate(PROMPTS, options), strict=True)
    }
    assert len(set(expected.values())) > len(alone)

    def ask(pair):
        name, prompt = pair
        both = {"mine": 0.1, "other": 0.2}
        model, strengths = ("stories", both) if name == "both" else (name, {})
        return client.text(model, prompt, max_tokens=24, strengths=strengths)

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        found = dict(zip(asked, clients.map(ask, asked), strict=True))
    assert found == expected


def test_a_chat_reads_the_template_and_ends_as_its_own_value_says(client, alone):
    dialogue = [{"role": "user", "content": "Once upon a time"}]
    texts = set()
    for name in ("mine", "stories+other"):
        expected = alone[name].generate(dialogue, max_new_tokens=16)
        status, body = client.chat(name, temperature=0, max_tokens=16)
        assert status == 200
        (choice,) = body["choices"]
        assert choice["message"]["content"] == expected.text
        assert body["usage"]["prompt_tokens"] == expected.prompt_tokens
        assert body["usage"]["completion_tokens"] == len(expected.token_ids)
        texts.add(expected.prompt_tokens)
    assert len(texts) > 1  # the templates differ


def test_a_stream_gives_the_same_text_in_pieces_and_then_the_usage(client):
    asked = {"model": "mine", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 24}
    _, whole = client.send("POST", "/v1/completions", asked)
    chunks = client.events("/v1/completions", **asked, stream_options={"include_usage": True})
    *pieces, last = chunks
    assert all(one["usage"] is None for one in pieces)
    assert len(pieces) > 3
    assert "".join(one["choices"][0]["text"] for one in pieces) == whole["choices"][0]["text"]
    assert [one["choices"][0]["finish_reason"] for one in pieces[-2:]] == [None, "length"]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert {one["id"] for one in chunks} == {chunks[0]["id"]}
    first = client.events("/v1/chat/completions", model="mine", messages=_user("Hi"), max_tokens=3)
    assert first[0]["choices"][0]["delta"]["role"] == "assistant"


def test_stop_strings_are_cut_where_pieces_split_them(client):
    text = client.text("mine", "Once upon a time", max_tokens=24)
    stop = text[7:13]
    expected = text[: text.index(stop)]
    asked = {"model": "mine", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 24}
    pieces = client.events("/v1/completions", **asked, stop=[stop])
    assert "".join(one["choices"][0]["text"] for one in pieces) == expected
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_choices_are_samples_of_one_seed_and_a_seed_repeats_them(client):
    asked = {"n": 3, "seed": 5, "temperature": 2.0, "max_tokens": 8}
    answers = [client.complete("mine", **asked)[1] for _ in range(2)]
    texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    assert answers[0]["usage"]["completion_tokens"] == 24
    assert [choice["index"] for choice in answers[0]["choices"]] == [0, 1, 2]
    several = client.complete("mine", PROMPTS[:2], temperature=0, max_tokens=4)[1]["choices"]
    assert [one["text"] for one in several] == [
        client.text("mine", prompt, max_tokens=4) for prompt in PROMPTS[:2]
    ]


def test_log_probabilities_have_openais_form(client, alone):
    expected = alone["mine"].generate(PROMPTS[0], max_new_tokens=5, log_probs=2)
    _, body = client.complete("mine", PROMPTS[0], temperature=0, max_tokens=5, logprobs=2)
    found = body["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(
        [scores.log_prob for scores in expected.log_probs], abs=1e-4
    )
    assert "".join(found["tokens"]) == expected.text
    assert [len(top) for top in found["top_logprobs"]] == [2] * 5
    assert found["text_offset"][:2] == [0, len(found["tokens"][0])]
    _, body = client.chat("mine", temperature=0, max_tokens=5, logprobs=True, top_logprobs=1)
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == body["choices"][0]["message"]["content"]
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content)
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in content)


def test_models_are_the_base_each_value_and_each_on_the_base(client):
    _, body = client.send("GET", "/v1/models")
    names = ["stories", "mine", "other", "stories+mine", "stories+other"]
    assert [model["id"] for model in body["data"]] == names
    described = {model["id"]: model for model in body["data"]}
    assert described["stories"]["strengths"] == {}
    assert described["mine"]["strengths"] == {"mine": 0.3}
    assert described["other"]["max_model_len"] == 160
    assert client.send("GET", "/v1/models/stories+mine")[1] == described["stories+mine"]


LONG = "Once upon a time " * 40


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"model": "nobody"}, 404, "the model 'nobody' does not exist: expected"),
        ("completions", {}, 400, "model is missing: expected the name of a model"),
        (
            "completions",
            {"strengths": {"x": 1}},
            400,
            "no value network is named 'x'; expected mi",
        ),
        ("completions", {"strengths": {"mine": float("nan")}}, 400, "that of mine must be finite"),
        ("completions", {"strengths": {"mine": 1e9}}, 400, "must be between -10,000 and 10,000"),
        ("completions", {"strengths": {"mine": "1"}}, 400, "strengths: expected an object from n"),
        ("completions", {"prompt": LONG, "model": "other"}, 400, "more than the context of 160 t"),
        (
            "completions",
            {"prompt": [[1] * 160], "model": "other"},
            400,
            "leaves no room for an ans",
        ),
        ("completions", {"prompt": [99999]}, 400, "token ids outside [0, 512): [99999]"),
        ("completions", {"n": 9}, 400, "n = 9 for 1 prompt(s): expected 1 to 8"),
        ("completions", {"n": 0}, 400, "n: expected an integer in [1, 2³¹), got 0"),
        ("completions", {"temperature": -1}, 400, "temperature must be ≥ 0 and finite, got -1"),
        ("completions", {"temperature": float("nan")}, 400, "temperature must be ≥ 0 and finite"),
        ("completions", {"temperature": 1e300}, 400, "temperature: at most 1000, got 1e+300"),
        ("completions", {"top_p": 2}, 400, "top_p must be in (0, 1], got 2"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens: expected an integer in [1, 2³¹), got"),
        ("completions", {"max_tokens": "5"}, 400, "an integer in [1, 2³¹), got '5'"),
        ("completions", {"stop": [""]}, 400, "stop must hold strings that are not empty"),
        ("completions", {"presence_penalty": 1}, 400, "presence_penalty is not supported by this"),
        ("completions", {"temprature": 1}, 400, "unknown field 'temprature'"),
        ("completions", {"prompt": "a \ud800"}, 400, r"lone surrogate, '\ud800', at character 2"),
        ("completions", {"max_tokens": 2**31}, 400, "an integer in [1, 2³¹), got 2147483648"),
        ("completions", {"\ud800": 1}, 400, r"unknown field '\ud800'"),  # half of a character
        ("completions", {"logprobs": 21}, 400, "at most 20 likeliest tokens can be shown, got 21"),
        ("chat/completions", {}, 400, "messages is missing: expected a list of messages"),
        ("chat/completions", {"messages": []}, 400, "expected 1 to 256 messages, got 0"),
        ("chat/completions", {"messages": ["x"]}, 400, "messages[0]: expected an object, got "),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "messages[0].role: expected one of system, developer, user, assistant, got 'tool'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "content": "x"}]},
            400,
            "a prompt must not end with an assistant's turn",
        ),
    ],
)
def test_a_request_that_cannot_be_answered_gets_one_clear_sentence(
    client, path, body, status, message
):
    given = {"model": "mine", "max_tokens": 4} if body else {}
    if path == "chat/completions":
        given = {"model": "mine"}
    found, answer = client.post(f"/v1/{path}", **{**given, **body})
    assert (found, set(answer)) == (status, {"error"})
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"5": 1, "99999": 1}, "logit_bias: token ids outside [0, 512): [99999]"),
        ({"5": 101}, "logit_bias must be between -100 and 100, got 101.0 for token 5"),
        ({"5": float("nan")}, "logit_bias must be between -100 and 100, got nan for token 5"),
        ({"5": 10**400}, "logit_bias must be between -100 and 100, got inf for token 5"),
        ({str(i): 1 for i in range(301)}, "logit_bias must name at most 300 tokens, got 301"),
        ({"Once": 1}, "logit_bias: expected an object from token ids to numbers, got {'Once'"),
        ({"-1": 1}, "logit_bias: expected an object from token ids to numbers, got {'-1': 1}"),
        ({"05": 1}, "logit_bias: expected an object from token ids to numbers, got {'05': 1}"),
        ({"5": "1"}, "logit_bias: expected an object from token ids to numbers, got {'5': '1'}"),
        ([5], "logit_bias: expected an object from token ids to numbers, got [5]"),
    ],
)
def test_a_logit_bias_that_cannot_be_added_gets_one_sentence(client, bias, message):
    status, answer = client.complete("mine", max_tokens=4, logit_bias=bias)
    assert (status, answer["error"]["param"]) == (400, "logit_bias")
    assert answer["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"name": "entrpy"},
            "strength_policy: expected one of constant, entropy, kl, got 'entrpy'",
        ),
        ({"name": "kl", "scale": 0}, "strength_policy: the scale must be between 1e-06 and 1e+06"),
        ({"name": "kl", "scale": 10**400}, "strength_policy: the scale must be between 1e-06"),
        ({"name": "kl", "scale": "1"}, "strength_policy: expected an object of name and, perhaps"),
        ({"scale": 1}, "strength_policy: expected an object of name and, perhaps, scale, got"),
        ({"name": "kl", "alpha": 1}, "strength_policy: expected an object of name and, perhaps"),
        ("kl", "strength_policy: expected an object of name and, perhaps, scale, got 'kl'"),
    ],
)
def test_a_strength_policy_that_cannot_be_used_gets_one_sentence(client, policy, message):
    status, answer = client.complete("mine", max_tokens=4, strength_policy=policy)
    assert (status, answer["error"]["param"]) == (400, "strength_policy")
    assert answer["error"]["message"].startswith(message)


def test_a_strength_policy_counts_in_its_own_request_alone(client, alone):
    asked = {"max_tokens": 12, "strengths": {"mine": 0.8}}
    plain = client.text("mine", "Lily said", **asked)
    policy = {"name": "entropy", "scale": 4.0}
    found = client.text("mine", "Lily said", strength_policy=policy, **asked)
    own = alone["mine"].generate(
        "Lily said",
        max_new_tokens=12,
        strengths=0.8,
        policy=StrengthPolicy("entropy", 4.0),
    )
    assert found == own.text != plain
    assert client.text("mine", "Lily said", **asked) == plain


def test_what_is_no_request_at_all_is_refused_in_the_same_form(client):
    deep = "[" * 5000
    for sent, status, message in [
        (b'{"model": ', 400, "the body, line 1"),
        (b"\xff", 400, "UTF-8"),
        (deep.encode(), 400, "the body"),
        (b"3", 400, "the body must be a JSON object, got "),
        (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413, "more than 1,048,576 bytes"),
    ]:
        found, answer = client.send("POST", "/v1/completions", sent)
        assert (found, message in answer["error"]["message"]) == (status, True), answer
    assert client.send("POST", "/v1/completions", b"{}", content_type="text/plain")[0] == 415
    assert client.send("GET", "/v1/nothing")[1]["error"]["message"].startswith("there is nothing")
    assert client.send("GET", "/v1/completions")[0] == 405
    assert client.send("GET", "/v1/models/nobody")[1]["error"]["code"] == "model_not_found"


def test_a_client_that_leaves_frees_its_row(client):
    before = client.figures()
    body = json.dumps({"model": "mine", "prompt": "A", "max_tokens": 400, "stream": True})
    for reads_a_piece in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if reads_a_piece:
            assert connection.getresponse().read(20).startswith(b"data: ")
        connection.close()
    deadline = time.monotonic() + 30
    while client.send("GET", "/health")[1]["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while (figures := client.figures())["ivl_running"] + figures["ivl_waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    made = figures["ivl_generated_tokens_total"] - before["ivl_generated_tokens_total"]
    assert made < 700
    assert client.text("mine", "A", max_tokens=4)


def test_figures_count_requests_tokens_and_waiting(client):
    before = client.figures()
    _, answer = client.complete("mine", max_tokens=6, temperature=0)
    client.complete("nobody")
    after = client.figures()

    def gained(name):
        return after.get(name, 0) - before.get(name, 0)

    path = 'path="/v1/completions"'
    assert gained(f'ivl_requests_total{{{path},status="200"}}') == 1
    assert gained(f'ivl_requests_total{{{path},status="404"}}') == 1
    usage = answer["usage"]
    assert gained("ivl_prompt_tokens_total") == usage["prompt_tokens"]
    assert gained("ivl_generated_tokens_total") == usage["completion_tokens"] == 6
    assert gained("ivl_time_to_first_token_seconds_count") == 1
    assert gained("ivl_time_per_token_seconds_count") == 1
    assert gained("ivl_batch_occupancy_count") >= 1
    assert after["ivl_running"] == after["ivl_waiting"] == 0


def test_a_full_queue_refuses_and_a_slow_one_gives_up(client, monkeypatch):
    service = client.prepared.service
    front = service.front
    few = dataclasses.replace(service.config, max_rows=1, max_waiting=1)
    monkeypatch.setattr(front, "_config", few)
    status, answer = client.complete("mine", n=3, max_tokens=4)
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    assert "at most 1 run and 1 wait" in answer["error"]["message"]
    assert client.complete("mine", n=2, max_tokens=4)[0] == 200
    monkeypatch.setattr(front, "_config", dataclasses.replace(few, queue_seconds=0.001))
    status, answer = client.complete("mine", max_tokens=4)
    assert (status, answer["error"]["code"]) == (503, "timeout")
    assert "has no token yet" in answer["error"]["message"]
    slow, engine = dataclasses.replace(few, request_seconds=3.0), service.engine._engine
    step = engine.step

    def step_slowly(**named):
        time.sleep(0.2)
        return step(**named)

    monkeypatch.setattr(engine, "step", step_slowly)
    monkeypatch.setattr(front, "_config", slow)
    chunks = client.events("/v1/completions", model="mine", prompt="A", max_tokens=500)
    assert "has not ended" in chunks[-1]["error"]["message"]
    monkeypatch.undo()
    assert client.complete("mine", max_tokens=4)[0] == 200


def test_a_failed_step_fails_its_requests_and_the_server_lives_on(client, monkeypatch):
    engine = client.prepared.service.engine._engine
    before = client.figures()["ivl_failed_steps_total"]
    expected = client.text("mine", "A", max_tokens=6)

    def fail(*_, **__):
        raise MemoryError("out of memory")

    monkeypatch.setattr(engine, "_advance", fail)
    status, answer = client.complete("mine", max_tokens=6)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "this request was lost (MemoryError): try again" in answer["error"]["message"]
    chunks = client.events("/v1/completions", model="mine", prompt="A", max_tokens=6)
    assert chunks[-1]["error"]["code"] == "decoding_failed"
    monkeypatch.undo()
    assert client.text("mine", "A", max_tokens=6) == expected
    assert client.figures()["ivl_failed_steps_total"] == before + 2
    assert client.send("GET", "/health") == (200, {"status": "ok", "in_flight": 0})


def test_a_key_is_asked_for_and_a_dead_engine_is_said(serve_config, folders):
    alone = dataclasses.replace(serve_config.model, value=("none",), strength=())
    with running(dataclasses.replace(serve_config, model=alone, api_key="sesame")) as client:
        for path in ("/health", "/", "/page.js", "/page.css"):
            assert client.send("GET", path)[0] == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
            status, answer = client.send("GET", "/v1/models", **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        key = {"authorization": "Bearer sesame"}
        assert client.send("GET", "/metrics", **key)[0] == 200
        lower = {"authorization": "bearer sesame"}
        assert client.send("GET", "/metrics", **lower)[0] == 200
        body = {"model": "stories", "prompt": "A", "max_tokens": 2}
        assert client.send("POST", "/v1/completions", body, **key)[0] == 200

        def die():
            raise KeyError("gone")

        client.prepared.service.engine._orders.put(die)
        deadline = time.monotonic() + 10
        while client.send("GET", "/health")[0] == 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status, answer = client.send("POST", "/v1/completions", body, **key)
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert "KeyError" in answer["error"]["message"]


def _user(text):
    return [{"role": "user", "content": text}]
